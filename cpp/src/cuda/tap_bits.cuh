#pragma once

#include <cstdint>

namespace binconv::cuda {

struct TapRange {
  int32_t first, end;
};

// The bits of one output channel's weights in a rectangle of taps, from the sums behind prepared
// weights (prepared_weight.h).
struct TapBits {
  const int32_t* sums;
  int64_t channels;
  int32_t kernel_width;

  __device__ int32_t count(TapRange rows, TapRange columns, int64_t channel) const {
    const auto up_to = [&](int32_t row, int32_t column) {
      const int64_t tap = int64_t{row - 1} * kernel_width + column - 1;
      return row == 0 || column == 0 ? 0 : sums[tap * channels + channel];
    };
    return up_to(rows.end, columns.end) - up_to(rows.first, columns.end) -
           up_to(rows.end, columns.first) + up_to(rows.first, columns.first);
  }
};

}  // namespace binconv::cuda
