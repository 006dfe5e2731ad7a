#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/conv2d_prelude.h"

namespace binconv::cpu {
namespace {

// Asked on every CPU, so it is compiled for every CPU.
bool runs_on(const Target& target) { return target.cpu.avx512_vpopcntdq; }

}  // namespace
}  // namespace binconv::cpu

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma")
#endif

#include "cpu/conv2d_tile.h"

namespace binconv::cpu {
namespace {

struct Avx512 {
  static constexpr int kWordBytes = 8;
  static constexpr int kVectors = 4;  // of 8 output channels each
  static constexpr int kLanes = 8 * kVectors;
  static constexpr int kBlock = kLanes;
  static constexpr int kRows = 6;  // 24 sums and 4 weight vectors fit into 32 registers.

  static void count(const uint8_t* rows, int64_t row_bytes, const uint8_t* weights, int64_t,
                    int32_t (&counts)[kRows][kBlock]) {
    __m512i sums[kRows][kVectors];
    for (auto& row : sums) {
      for (__m512i& sum : row) sum = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < row_bytes; k += kWordBytes) {
      __m512i weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        weight[v] = _mm512_loadu_si512(weights + k * kBlock + v * 64);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int64_t bits;
        std::memcpy(&bits, rows + r * row_bytes + k, sizeof bits);
        const __m512i word = _mm512_set1_epi64(bits);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const __m512i mismatches = _mm512_popcnt_epi64(_mm512_xor_si512(word, weight[v]));
          sums[r][v] = _mm512_add_epi64(sums[r][v], mismatches);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(&counts[r][8 * v]),
                           _mm512_maskz_cvtepi64_epi32(0xff, sums[r][v]));
      }
    }
  }
};

}  // namespace

constexpr Kernel kConv2dAvx512 = make_kernel<Avx512>("cpu_avx512", runs_on);

}  // namespace binconv::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
