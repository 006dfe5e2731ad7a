#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/byte_lanes.h"
#include "cpu/conv2d_prelude.h"
#include "cpu/conv2d_tile.h"

namespace binconv::cpu {
namespace {

struct Neon {
  static constexpr int kWordBytes = 1;
  static constexpr int kLanes = 32;
  static constexpr int kBlock = kLanes;
  static constexpr int kRows = 6;

  static void count(const uint8_t* rows, int64_t row_bytes, const uint8_t* weights, int64_t,
                    int32_t (&counts)[kRows][kBlock]) {
    count_byte_lanes<Neon, 1>(rows, row_bytes, weights, counts);
  }

  template <int>
  static void add_segment(const uint8_t* rows, int64_t row_bytes, int64_t begin, int64_t end,
                          const uint8_t* weights, uint16_t (&sums)[kRows][kBlock]) {
    uint8x16_t acc[kRows][2];
    for (auto& row : acc) row[0] = row[1] = vdupq_n_u8(0);
    for (int64_t k = begin; k < end; ++k) {
      const uint8x16_t weight[2] = {vld1q_u8(weights + k * kBlock),
                                    vld1q_u8(weights + k * kBlock + 16)};
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const uint8x16_t bits = vld1q_dup_u8(rows + r * row_bytes + k);
#pragma GCC unroll 8
        for (int v = 0; v < 2; ++v)
          acc[r][v] = vaddq_u8(acc[r][v], vcntq_u8(veorq_u8(bits, weight[v])));
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) {
        uint16_t* out = sums[r] + 16 * v;
        vst1q_u16(out, vaddw_u8(vld1q_u16(out), vget_low_u8(acc[r][v])));
        vst1q_u16(out + 8, vaddw_high_u8(vld1q_u16(out + 8), acc[r][v]));
      }
    }
  }
};

}  // namespace

constexpr Kernel kConv2dNeon =
    make_kernel<Neon>("cpu_neon", [](const Target& target) { return target.cpu.neon; });

}  // namespace binconv::cpu

#endif
