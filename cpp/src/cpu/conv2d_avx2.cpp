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
  static constexpr int kBlock = 32;
  static constexpr int kRows =
      6;  // 6 sums, 2 tables, 2 weight vectors and a mask fit into 16 registers.

  static void count(const uint8_t* rows, int64_t row_bytes, const uint8_t* weights,
                    int32_t (&counts)[kRows][kBlock]) {
    count_byte_lanes<Avx2>(rows, row_bytes, weights, counts);
  }

  static void add_segment(const uint8_t* rows, int64_t row_bytes, int64_t begin, int64_t end,
                          const uint8_t* weights, uint16_t (&sums)[kRows][kBlock]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i acc[kRows];
    for (__m256i& sum : acc) sum = _mm256_setzero_si256();
    for (int64_t k = begin; k < end; ++k) {
      const __m256i weight =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + k * kBlock));
      const __m256i low = _mm256_and_si256(weight, nibble);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(weight, 4), nibble);
      for (int r = 0; r < kRows; ++r) {
        const __m128i* table =
            reinterpret_cast<const __m128i*>(kMismatches[rows[r * row_bytes + k]].data());
        const __m256i low_table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
        const __m256i high_table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table + 1));
        acc[r] = _mm256_add_epi8(acc[r], _mm256_shuffle_epi8(low_table, low));
        acc[r] = _mm256_add_epi8(acc[r], _mm256_shuffle_epi8(high_table, high));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      add(sums[r], _mm256_castsi256_si128(acc[r]));
      add(sums[r] + 16, _mm256_extracti128_si256(acc[r], 1));
    }
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
