#include "emulation/gpu.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "emulation/barriers.h"
#include "emulation/copies.h"
#include "emulation/fibers.h"
#include "emulation/shared_memory.h"
#include "emulation/warps.h"
#include "emulation/wgmma.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace binconv::emulation {
namespace {

void run_block(int threads, int64_t shared_bytes, const std::function<void()>& thread) {
  reset_shared_memory(shared_bytes);
  reset_barriers();
  reset_copies();
  reset_wgmma();
  reset_warps(threads);
  run_threads(threads, thread);
  check_shared_memory();
  check_barriers();
  check_copies();
  check_wgmma();
}

}  // namespace

Device& device() {
  static Device the_device = kHopper;
  return the_device;
}

PlanCounts& plan_counts() {
  static PlanCounts counts = {};
  return counts;
}

void run_grid(dim3 blocks, dim3 threads, int64_t shared_bytes,
              const std::function<void()>& thread) {
  static std::mutex mutex;  // One launch at a time, whichever thread launches.
  const std::lock_guard lock(mutex);
  seed_random(device().seed++);
  gridDim = blocks;
  blockDim = threads;
  for (unsigned y = 0; y < blocks.y; ++y) {
    for (unsigned x = 0; x < blocks.x; ++x) {
      blockIdx = {x, y, 0};
      try {
        run_block(static_cast<int>(threads.x), shared_bytes, thread);
      } catch (const Failure& failure) {
        fail(failure.what(), " in block (", x, ", ", y, ") of a launch with seed ",
             device().seed - 1, describe_barriers());
      }
    }
  }
}

}  // namespace binconv::emulation
