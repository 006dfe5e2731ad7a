#pragma once

#include <cstdint>

#include "emulation/barriers.h"

namespace cutlass::arch {

class ClusterBarrier {
 public:
  ClusterBarrier() = delete;
  void init(uint32_t count) const { binconv::emulation::init_barrier(this, count); }
  void wait(uint32_t parity) const { binconv::emulation::wait_for_parity(this, parity); }
  void arrive() const { binconv::emulation::arrive(this); }

 private:
  uint64_t state_;
};

class ClusterTransactionBarrier : public ClusterBarrier {
 public:
  ClusterTransactionBarrier() = delete;
  void arrive_and_expect_tx(uint32_t bytes) const {
    binconv::emulation::expect_bytes(this, bytes);
    arrive();
  }
};

struct NamedBarrier {
  static void sync(uint32_t threads, uint32_t id) {
    constexpr uint32_t kReserved = 8;  // CUTLASS keeps the first ones for itself.
    binconv::emulation::sync_named(kReserved + id, threads);
  }
};

// Memory is always seen in the order of the steps.
inline void fence_barrier_init() {}
inline void fence_view_async_shared() {}

}  // namespace cutlass::arch
