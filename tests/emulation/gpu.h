#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <string>

// The emulated GPU: what a test sets of it, and how a launch runs on it, one block after the other
// and before the launch returns.

namespace binconv::emulation {

struct Device {
  int multiprocessors;
  int shared_bytes;          // That one thread block can have.
  uint64_t seed = 1;         // Of the next launch; every launch counts it up.
  bool draws_plans = false;  // The tensor-core kernels take any plan that fits, not the best one.
};

constexpr int kComputeCapability = 90;
constexpr Device kHopper = {132, 227 * 1024};
constexpr Device kAda = {142, 99 * 1024};

Device& device();

// How many launches had each kind of plan.
struct PlanCounts {
  int64_t resident_32, resident_64, resident_128, streamed, several_images, cut_rows,
      shared_padding;
};
PlanCounts& plan_counts();

// Runs `thread` in every thread of every block. Throws Failure.
void run_grid(dim3 blocks, dim3 threads, int64_t shared_bytes, const std::function<void()>& thread);

}  // namespace binconv::emulation
