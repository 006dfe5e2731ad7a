#pragma once

#include <cstdint>

#include "cuda/chunk.h"
#include "kernel_table.h"

// The weight format of all CUDA kernels, so that any of them can be chosen once an image size is
// known: first the bits, uint32 [channels / 8][chunks][taps][8][4], that is core matrices of 8
// output channels and the 16 bytes of one chunk and tap; then int32 [taps][channels], of each
// output channel the bits in all taps up to a tap's row and column. Channels beyond out_channels
// are zero.

namespace binconv::cuda {

constexpr int kCoreRows = 8;
constexpr int kCoreBytes = kCoreRows * kChunkBytes;

// The row that a channel has among the core matrices. A lane of the tensor cores gets columns 8 * j
// + 2 * q + c of a result, one q and every j < 4 and c < 2; that these be neighbours, channel 8 * q
// + 2 * j + c is there. The same function leads back.
constexpr int64_t weight_row(int64_t channel) {
  return (channel & ~int64_t{30}) | (channel >> 2 & 6) | (channel << 2 & 24);
}

struct PreparedLayout {
  int64_t chunks;    // Of one group of input channels.
  int64_t taps;      // kernel_height * kernel_width
  int64_t channels;  // out_channels, rounded up to the largest block of a kernel.

  // In units of 16 bytes.
  constexpr int64_t chunk_index(int64_t channel, int64_t chunk, int64_t tap) const {
    const int64_t row = weight_row(channel);
    return ((row / kCoreRows * chunks + chunk) * taps + tap) * kCoreRows + row % kCoreRows;
  }
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
void prepare_values(const WeightShape& shape, const WeightValues& weight, uint8_t* prepared,
                    float* means, const Queue& queue);

}  // namespace binconv::cuda
