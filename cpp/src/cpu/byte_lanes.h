// Counting for instruction sets whose lanes are bytes: each holds the count of one output channel,
// which overflows after 31 bytes of a row. Included like conv2d_tile.h, after the target is
// switched on.
//
// Isa::add_segment<kVectors>(rows, row_bytes, begin, end, weights, sums) adds the counts of bytes
// [begin, end) of each row, kSegment at most, with kVectors times kLanes channels to
// sums[row][channel].

#include "cpu/conv2d_prelude.h"

namespace binconv::cpu {
namespace {

inline constexpr int64_t kSegment = 31;            // 31 * 8 <= 255
inline constexpr int64_t kPanel = 264 * kSegment;  // kPanel * 8 <= 65535
static_assert(kSegment * 8 <= 255 && kPanel * 8 <= 65535);

template <class Isa, int kVectors>
void count_byte_lanes(const uint8_t* rows, int64_t row_bytes, const uint8_t* weights,
                      int32_t (&counts)[Isa::kRows][Isa::kBlock]) {
  std::memset(counts, 0, sizeof counts);
  for (int64_t panel = 0; panel < row_bytes; panel += kPanel) {
    alignas(64) uint16_t sums[Isa::kRows][kVectors * Isa::kLanes] = {};
    const int64_t panel_end = std::min(panel + kPanel, row_bytes);
    for (int64_t begin = panel; begin < panel_end; begin += kSegment) {
      Isa::template add_segment<kVectors>(rows, row_bytes, begin,
                                          std::min(begin + kSegment, panel_end), weights, sums);
    }
    for (int r = 0; r < Isa::kRows; ++r) {
      for (int o = 0; o < kVectors * Isa::kLanes; ++o) counts[r][o] += sums[r][o];
    }
  }
}

}  // namespace
}  // namespace binconv::cpu
