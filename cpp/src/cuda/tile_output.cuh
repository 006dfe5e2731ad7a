#pragma once

#include "binconv/conv2d.h"
#include "check.h"
#include "cuda/halo.cuh"
#include "cuda/numeric.cuh"

// What the tensor-core kernels are to make of their sums, and what a warp holds while it does.
//
// A lane holds, for rows i of {lane / 4, lane / 4 + 8} of a warp's 16 pixels and columns 8 * j + 2
// * (lane % 4) + c of its channels, the accumulator [4 * j + 2 * i + c].

namespace binconv::cuda {

constexpr int kWarpPixels = 16;
constexpr int kGroup = 32;       // Columns that are finished together: a word of bits.
constexpr int kGroupBlocks = 4;  // Of 8 columns.

struct TileOutput {
  Epilogue epilogue;
  void* data;
  int64_t plane_pixels;  // out_height * out_width
  int64_t channels;
  int64_t value_bytes;   // Of one value.
  int32_t packed_words;  // Of a pixel of bits.
  bool has_pieces;       // Rows of values start and end at 16-byte pieces.
  bool is_plain;         // Nothing happens between scale and bias and the output.
  bool is_simple;        // All of this: plain floating-point values in pieces, no clamp, no bits.
  bool is_bits;          // Plain, and only bits are asked for.
  bool stages_residual;  // The residual lies like the values, which are in pieces.
};

// The parameter of a kernel.
struct TileConv {
  HaloConv conv;
  TileOutput out;
};

inline TileOutput tile_output(const Conv2dArgs& args) {
  const Epilogue& epilogue = args.epilogue;
  const int64_t channels = args.shape.weight.out_channels;
  const bool has_values = epilogue.out_type != DataType::kBits;
  const int64_t value_bytes = has_values ? element_bytes(epilogue.out_type) : 0;
  const bool has_pieces = epilogue.out_layout == Layout::kNHWC &&
                          channels * value_bytes % kVectorBytes == 0 &&
                          is_vector_aligned(args.output);
  const bool is_plain = !epilogue.residual && !epilogue.activation.enabled;
  const bool is_float = has_values && epilogue.out_type != DataType::kInt32;
  return {.epilogue = epilogue,
          .data = args.output,
          .plane_pixels = args.shape.out_height() * args.shape.out_width(),
          .channels = channels,
          .value_bytes = value_bytes,
          .packed_words = static_cast<int32_t>(packed_bytes(channels) / sizeof(uint32_t)),
          .has_pieces = has_pieces,
          .is_plain = is_plain,
          .is_simple = is_float && is_plain && has_pieces && !epilogue.clamp && !epilogue.bits,
          .is_bits = !has_values && is_plain,
          .stages_residual = has_values && has_pieces && epilogue.residual &&
                             element_bytes(epilogue.residual_type) == value_bytes &&
                             is_vector_aligned(epilogue.residual)};
}

inline TileConv tile_conv(const Conv2dArgs& args, const HaloPlan& plan) {
  return {halo_conv(args, plan), tile_output(args)};
}

// What one lane has of a group: [block of 8 columns][row][column].
using Group = float[kGroupBlocks][2][2];

__device__ inline int32_t group_column(int block, int c) {
  return 8 * block + 2 * static_cast<int32_t>(threadIdx.x % 4) + c;
}

// What a warp turns into outputs.
template <int kColumns>
struct WarpRun {
  const int32_t (&acc)[kColumns / 2];
  const Pixel* warp_pixels;
  Pixel pixels[2];       // Of this lane.
  const int32_t* table;  // From here on in shared memory, from the run's first channel.
  const float4* scaling;
  const float4* limits;
  const float* activation;
  int32_t block_channels;
  uint8_t* staging;
  int32_t first_channel;
};

}  // namespace binconv::cuda
