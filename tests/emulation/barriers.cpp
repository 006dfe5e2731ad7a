#include "emulation/barriers.h"

#include <array>
#include <cstring>
#include <map>

#include "emulation/fibers.h"
#include "emulation/shared_memory.h"

namespace binconv::emulation {
namespace {

constexpr uint32_t kCountLimit = 1 << 20;  // Of arrivals and of bytes.
constexpr uint64_t kMark = 0xba44ba44c0de0000;

struct Barrier {
  const void* memory;
  uint32_t count, pending;
  uint32_t parity = 0;  // Of the phase that has not ended.
  int64_t bytes = 0;
  int64_t phases = 0;
  Waiters waiters;
};

std::map<int64_t, Barrier> barriers;  // By their place in shared memory.

struct NamedBarrier {
  uint32_t arrived = 0, expected = 0;
  int64_t generation = 0;
  Waiters waiters;
};

constexpr int kNamedBarriers = 16;
std::array<NamedBarrier, kNamedBarriers> named_barriers;

int64_t place_of(const void* barrier) {
  return shared_offset(barrier, sizeof(uint64_t), sizeof(uint64_t), "an mbarrier");
}

// What an mbarrier's 8 bytes hold here; nobody else may write there.
uint64_t mark_of(int64_t place) { return kMark + static_cast<uint64_t>(place); }

Barrier& find_barrier(const void* barrier) {
  const int64_t place = place_of(barrier);
  const auto found = barriers.find(place);
  require(found != barriers.end(), "the mbarrier at ", place, " is not initialized");
  uint64_t mark;
  std::memcpy(&mark, barrier, sizeof mark);
  require(mark == mark_of(place), "the mbarrier at ", place, " was overwritten");
  return found->second;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  barrier.parity ^= 1;
  ++barrier.phases;
  wake(barrier.waiters);
}

}  // namespace

void reset_barriers() {
  barriers.clear();
  named_barriers.fill({});
}

void check_barriers() {
  for (const auto& [place, barrier] : barriers) find_barrier(barrier.memory);
}

std::string describe_barriers() {
  std::ostringstream text;
  for (const auto& [place, barrier] : barriers) {
    text << "\n  mbarrier at " << place << ": parity " << barrier.parity << ", " << barrier.pending
         << " of " << barrier.count << " arrivals and " << barrier.bytes
         << " bytes to come, phases ended: " << barrier.phases;
  }
  return text.str();
}

void init_barrier(const void* barrier, uint32_t count) {
  const int64_t place = place_of(barrier);
  require(count > 0 && count < kCountLimit, "an mbarrier for ", count, " arrivals");
  const bool is_new =
      barriers.insert({place, {.memory = barrier, .count = count, .pending = count}}).second;
  require(is_new, "the mbarrier at ", place, " is initialized twice");
  const uint64_t mark = mark_of(place);
  std::memcpy(const_cast<void*>(barrier), &mark, sizeof mark);
}

void wait_for_parity(const void* barrier, uint32_t parity) {
  require(parity <= 1, "a wait for parity ", parity);
  for (;;) {
    Barrier& found = find_barrier(barrier);
    if (found.parity != parity) return;
    wait_in(found.waiters, "mbarrier wait", place_of(barrier), parity);
  }
}

void arrive(const void* barrier) {
  Barrier& found = find_barrier(barrier);
  require(found.pending > 0, "too many arrivals at the mbarrier at ", place_of(barrier));
  --found.pending;
  end_phase_if_complete(found);
  if (random().one_in(4)) yield();
}

void expect_bytes(const void* barrier, uint32_t bytes) {
  Barrier& found = find_barrier(barrier);
  found.bytes += bytes;
  require(found.bytes < kCountLimit, found.bytes, " bytes are too many for the mbarrier at ",
          place_of(barrier));
}

void complete_bytes(const void* barrier, int64_t bytes) {
  Barrier& found = find_barrier(barrier);
  found.bytes -= bytes;
  require(found.bytes > -int64_t{kCountLimit}, "too many bytes arrived at the mbarrier at ",
          place_of(barrier));
  end_phase_if_complete(found);
}

void check_barrier(const void* barrier) { find_barrier(barrier); }

void sync_named(uint32_t id, uint32_t threads) {
  require(id < kNamedBarriers, "named barrier ", id);
  require(threads % kWarpSize == 0, "named barrier ", id, " for ", threads, " threads");
  NamedBarrier& barrier = named_barriers[id];
  require(barrier.arrived == 0 || barrier.expected == threads, "named barrier ", id, " for ",
          barrier.expected, " and for ", threads, " threads");
  barrier.expected = threads;
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    wake(barrier.waiters);
    yield();
    return;
  }
  while (barrier.generation == generation) wait_in(barrier.waiters, "named barrier", id);
}

}  // namespace binconv::emulation
