#pragma once

#include "emulation/wgmma.h"

// In place of the library's wgmma_b1.cuh, which is made of PTX.

namespace binconv::cuda {

inline void wgmma_fence() { emulation::fence_accumulators(); }
inline void wgmma_commit() { emulation::commit_multiplications(); }
template <int kPending>
void wgmma_wait() {
  emulation::wait_for_multiplications(kPending);
}
template <bool kAccumulate, int kSize>
void wgmma_and_popcount(int32_t (&d)[kSize], uint64_t a, uint64_t b) {
  static_assert(kSize == 24 || kSize == 40 || kSize == 72);
  emulation::multiply_async(d, 2 * kSize, kAccumulate, a, b);
}

}  // namespace binconv::cuda
