#pragma once

#include <cstdint>
#include <cute/arch/mma_sm80.hpp>

namespace binconv::cuda {

// A warp's multiplication of bits: d += popcount(a & b), of 16 rows of a, 8 columns of b and 256
// bits. Who has which of them is in the PTX ISA, "Matrix fragments for mma.m16n8k256".
__device__ inline void mma_and_popcount(int32_t* d, const uint32_t (&a)[4], uint32_t low,
                                        uint32_t high) {
  uint32_t sums[4];
  cute::SM80_16x8x256_S32U1U1S32_TN_ANDPOPC::fma(sums[0], sums[1], sums[2], sums[3], a[0], a[1],
                                                 a[2], a[3], low, high, d[0], d[1], d[2], d[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = static_cast<int32_t>(sums[i]);
}

}  // namespace binconv::cuda
