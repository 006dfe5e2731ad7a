#pragma once

#include <cstdint>

#include "cuda/chunk.h"
#include "kernel_table.h"

// The weight format of all CUDA kernels, so that any of them can be chosen once an image size is
// known: uint32 [chunks][taps][channels][4], that is the 16-byte chunks of one tap and chunk of all
// output channels side by side, then the bit counts of the taps, int32 [taps][channels]. Channels
// beyond out_channels are zero.

namespace binconv::cuda {

struct PreparedLayout {
  int64_t chunks;    // Of one group of input channels.
  int64_t taps;      // kernel_height * kernel_width
  int64_t channels;  // out_channels, rounded up to the largest block of a kernel.

  constexpr int64_t bit_bytes() const { return chunks * taps * channels * kChunkBytes; }
  constexpr int64_t bytes() const {
    return bit_bytes() + taps * channels * static_cast<int64_t>(sizeof(int32_t));
  }
};

PreparedLayout prepared_layout(const WeightShape& shape);

// For rows of the kernel table.
int64_t prepared_bytes(const WeightShape& shape);
void prepare_weight(const WeightShape& shape, const uint8_t* packed, uint8_t* prepared,
                    const Queue& queue);

}  // namespace binconv::cuda
