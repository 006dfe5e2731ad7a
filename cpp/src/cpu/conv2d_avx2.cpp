#if defined(__x86_64__)

#include <immintrin.h>

#include <array>

#include "cpu/conv2d_prelude.h"

namespace binconv::cpu {
namespace {

// Asked on every CPU, so it is compiled for every CPU.
bool runs_on(const Target& target) { return target.cpu.avx2; }

}  // namespace
}  // namespace binconv::cpu

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "cpu/byte_lanes.h"
#include "cpu/conv2d_tile.h"

namespace binconv::cpu {
namespace {

// AVX2 has no popcount, but a byte shuffle that looks up 32 values of 4 bits at once. Looking the
// weights up in a table that belongs to the row's bits makes xor and popcount one instruction: for
// a row byte b, kMismatches[b] holds popcount((b & 15) ^ i) and popcount((b >> 4) ^ i) for every i.
constexpr auto kMismatches = [] {
  std::array<std::array<uint8_t, 32>, 256> table{};
  for (unsigned b = 0; b < 256; ++b) {
    for (unsigned i = 0; i < 16; ++i) {
      table[b][i] = static_cast<uint8_t>(std::popcount((b & 15) ^ i));
      table[b][16 + i] = static_cast<uint8_t>(std::popcount((b >> 4) ^ i));
    }
  }
  return table;
}();

struct Avx2 {
  static constexpr int kWordBytes = 1;
  static constexpr int kLanes = 32;
  static constexpr int kBlock = 64;
  // 8 sums, 4 weight vectors, 2 tables and a mask: all 16 registers but one.
  static constexpr int kRows = 4;

  static void count(const uint8_t* rows, int64_t row_bytes, const uint8_t* weights,
                    int64_t channels, int32_t (&counts)[kRows][kBlock]) {
    if (channels > kLanes) {
      count_byte_lanes<Avx2, 2>(rows, row_bytes, weights, counts);
    } else {
      count_byte_lanes<Avx2, 1>(rows, row_bytes, weights, counts);
    }
  }

  template <int kVectors>
  static void add_segment(const uint8_t* rows, int64_t row_bytes, int64_t begin, int64_t end,
                          const uint8_t* weights, uint16_t (&sums)[kRows][kVectors * kLanes]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i acc[kRows][kVectors];
    for (auto& row : acc) {
      for (__m256i& sum : row) sum = _mm256_setzero_si256();
    }
    for (int64_t k = begin; k < end; ++k) {
      __m256i low[kVectors], high[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* lanes = weights + (v * row_bytes + k) * kLanes;
        const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
        low[v] = _mm256_and_si256(weight, nibble);
        high[v] = _mm256_and_si256(_mm256_srli_epi16(weight, 4), nibble);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* table = kMismatches[rows[r * row_bytes + k]].data();
        const __m256i low_table = broadcast(table), high_table = broadcast(table + 16);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = _mm256_add_epi8(acc[r][v], _mm256_shuffle_epi8(low_table, low[v]));
          acc[r][v] = _mm256_add_epi8(acc[r][v], _mm256_shuffle_epi8(high_table, high[v]));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        add(&sums[r][v * kLanes], _mm256_castsi256_si128(acc[r][v]));
        add(&sums[r][v * kLanes + 16], _mm256_extracti128_si256(acc[r][v], 1));
      }
    }
  }

  static __m256i broadcast(const uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  }

  static void add(uint16_t* sums, __m128i bytes) {
    __m256i* out = reinterpret_cast<__m256i*>(sums);
    _mm256_store_si256(out, _mm256_add_epi16(_mm256_load_si256(out), _mm256_cvtepu8_epi16(bytes)));
  }
};

}  // namespace

constexpr Kernel kConv2dAvx2 = make_kernel<Avx2>("cpu_avx2", runs_on);

}  // namespace binconv::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
