#pragma once

#include "binconv/conv2d.h"
#include "cuda/epilogue.cuh"
#include "cuda/halo.cuh"
#include "cuda/numeric.cuh"

// The end of the tensor-core kernels: a warp turns its 16 pixels of a run into outputs. Nothing is
// shared with other warps, so that nothing has to wait.
//
// A lane holds, for rows i of {lane / 4, lane / 4 + 8} and columns 8 * j + 2 * (lane % 4) + c, the
// accumulator [4 * j + 2 * i + c]. Outputs of one row are far apart over the lanes; rows of 128
// bytes are put together in shared memory and leave in 16-byte pieces.

namespace binconv::cuda {

constexpr int kGroup = 32;       // Columns that are finished together: a word of bits.
constexpr int kGroupBlocks = 4;  // Of 8 columns.
constexpr int kWarpPixels = 16;
constexpr int kStagingRow = 128;  // Bytes of a row in staging memory.
constexpr int kWarpStaging = kWarpPixels * kStagingRow;

struct TileOutput {
  Epilogue epilogue;
  void* data;
  int64_t plane_pixels;  // out_height * out_width
  int64_t channels;
  int32_t packed_words;  // Of a pixel of bits.
  bool has_pieces;       // Rows of values start and end at 16-byte pieces.
  bool is_plain;         // Nothing happens between scale and bias and the output.
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
  const int64_t row_bytes = has_values ? channels * element_bytes(epilogue.out_type) : 0;
  return {.epilogue = epilogue,
          .data = args.output,
          .plane_pixels = args.shape.out_height() * args.shape.out_width(),
          .channels = channels,
          .packed_words = static_cast<int32_t>(packed_bytes(channels) / sizeof(uint32_t)),
          .has_pieces = epilogue.out_layout == Layout::kNHWC && row_bytes % kVectorBytes == 0 &&
                        is_vector_aligned(args.output),
          .is_plain = !epilogue.residual && !epilogue.activation.enabled};
}

inline TileConv tile_conv(const Conv2dArgs& args, const HaloPlan& plan) {
  return {halo_conv(args, plan), tile_output(args)};
}

// What the epilogue needs of the block's channels, in shared memory, for two channels at a time:
// scales, then biases; and thresholds, then signs that turn y <= threshold into y >= threshold.
// Work for `threads` threads, of which this one is number `thread`.
__device__ inline void load_channels(const TileOutput& out, const HaloConv& conv, int thread,
                                     int threads) {
  float* scaling = shared<float>(conv.at.scaling);
  float* limits = shared<float>(conv.at.limits);
  for (int32_t i = thread; i < conv.plan.block_channels; i += threads) {
    const int64_t channel = first_channel(conv) + i;
    const ChannelTerms terms =
        channel < out.channels ? load_channel_terms(out.epilogue, channel) : ChannelTerms{};
    const int32_t at = i / 2 * 4 + i % 2;
    scaling[at] = terms.scale, scaling[at + 2] = terms.bias;
    limits[at] = terms.below ? -terms.threshold : terms.threshold;
    limits[at + 2] = terms.below ? -0.0f : 0.0f;
  }
}

__device__ inline bool passes(float y, float limit, float sign) {
  return __int_as_float(__float_as_int(y) ^ __float_as_int(sign)) >= limit;
}

// What one lane has of a group: [block of 8 columns][row][column].
using Group = float[kGroupBlocks][2][2];

__device__ inline int32_t group_column(int block, int c) {
  return 8 * block + 2 * static_cast<int32_t>(threadIdx.x % 4) + c;
}

template <class Visit>
__device__ void for_each(Group& y, const Visit& visit) {
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int c = 0; c < 2; ++c) visit(y[block][row][c], row, group_column(block, c));
    }
  }
}

// Where element (pixel, channel) of the values and the residual lies: at base + channel * step.
struct Rows {
  int64_t base[2], step;
  bool is_valid[2];
};

__device__ inline Rows locate_rows(const TileOutput& out, const Pixel (&pixels)[2]) {
  Rows rows;
  const bool nhwc = out.epilogue.out_layout == Layout::kNHWC;
  rows.step = nhwc ? 1 : out.plane_pixels;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t index = pixels[i].index;
    rows.is_valid[i] = index >= 0;
    rows.base[i] = index * out.channels;
    if (!nhwc) {
      const int64_t image = index / out.plane_pixels;
      rows.base[i] = image * (out.channels - 1) * out.plane_pixels + index;
    }
  }
  return rows;
}

// From accumulators to scale * acc + bias, or to acc where the output is int32.
template <int kColumns>
__device__ void scale_group(const TileOutput& out, const int32_t (&acc)[kColumns / 2], int group,
                            const Pixel (&pixels)[2], const int32_t* table, const float4* scaling,
                            Group& y) {
  const bool is_integer = out.epilogue.out_type == DataType::kInt32;
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int32_t column = group * kGroup + group_column(block, 0);
    const float4 terms = scaling[column / 2];  // Scales, then biases of two channels.
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int2 t = *reinterpret_cast<const int2*>(table + pixels[row].table + column);
      const int32_t* d = acc + 4 * (group * kGroupBlocks + block) + 2 * row;
      float a0 = __int_as_float(4 * d[0] + t.x) + pixels[row].window;
      float a1 = __int_as_float(4 * d[1] + t.y) + pixels[row].window;
      if (out.epilogue.clamp) a0 = fmaxf(a0, 0.0f), a1 = fmaxf(a1, 0.0f);
      y[block][row][0] = is_integer ? a0 : __fmaf_rn(a0, terms.x, terms.z);
      y[block][row][1] = is_integer ? a1 : __fmaf_rn(a1, terms.y, terms.w);
    }
  }
}

// Residual and activation.
__device__ inline void finish_group(const TileOutput& out, const Rows& rows, int64_t first_channel,
                                    Group& y) {
  const Epilogue& epilogue = out.epilogue;
  for_each(y, [&](float& value, int row, int32_t column) {
    const int64_t channel = first_channel + column;
    if (!rows.is_valid[row] || channel >= out.channels) return;
    value = add_residual(epilogue, rows.base[row] + channel * rows.step, value);
    if (!epilogue.activation.enabled) return;
    value = apply_activation(value, load_activation_terms(epilogue.activation, channel));
  });
}

// The bits of a group, for both rows; every lane of a row's four gets its word.
__device__ inline void pack_group(const TileOutput& out, int64_t first_channel,
                                  const float4* limits, Group& y, uint32_t (&words)[2]) {
  words[0] = words[1] = 0;
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int column = group_column(block, 0);
    const float4 limit = limits[column / 2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      words[row] |= uint32_t{passes(y[block][row][0], limit.x, limit.z)} << column;
      words[row] |= uint32_t{passes(y[block][row][1], limit.y, limit.w)} << (column + 1);
    }
  }
  const int64_t left = out.channels - first_channel;
  const uint32_t valid = left >= kGroup ? ~0u : (1u << left) - 1;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    words[row] |= __shfl_xor_sync(kWholeWarp, words[row], 1);
    words[row] |= __shfl_xor_sync(kWholeWarp, words[row], 2);
    words[row] &= valid;
  }
}

// Lane q of a row's four stores word q of the run's channels; those of the last channels also the
// zeros behind them.
template <int kWords>
__device__ void store_words(const TileOutput& out, void* bits, const Pixel (&pixels)[2],
                            int64_t first_channel, const uint32_t (&words)[kWords][2]) {
  const int q = threadIdx.x % 4;
  const int32_t first = static_cast<int32_t>(first_channel / kGroup);
  const bool is_last = first_channel + kWords * kGroup >= out.channels;
  if (first + q >= out.packed_words || (q >= kWords && !is_last)) return;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) word = q == k ? words[k][row] : word;
    if (pixels[row].index < 0) continue;
    static_cast<uint32_t*>(bits)[int64_t{pixels[row].index} * out.packed_words + first + q] = word;
  }
}

// Bytes from the start of staging memory; 16-byte pieces change places so that neither the lanes of
// a column nor those of a row meet in a bank.
__device__ inline int staging_offset(int row, int byte) {
  return row * kStagingRow + ((byte / kVectorBytes ^ row % 8) * kVectorBytes) + byte % kVectorBytes;
}

template <class T>
__device__ void stage_group(uint8_t* staging, int first_byte, Group& y) {
  const int row = threadIdx.x % kWarpSize / 4;
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int byte = first_byte + group_column(block, 0) * static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Vector<T, 2> pair = {{from_float<T>(y[block][i][0]), from_float<T>(y[block][i][1])}};
      store_vector(reinterpret_cast<T*>(staging + staging_offset(row + 8 * i, byte)), pair);
    }
  }
}

// Stores the staged channels, from first_channel up to but not with last_channel.
template <class T>
__device__ void flush_staging(const TileOutput& out, const uint8_t* staging, const Pixel* pixels,
                              int64_t first_channel, int64_t last_channel) {
  constexpr int kPieces = kStagingRow / kVectorBytes;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t channel = first_channel + lane % kPieces * kVectorWidth<T>;
  __syncwarp();
#pragma unroll
  for (int first = 0; first < kWarpPixels; first += kWarpSize / kPieces) {
    const int row = first + lane / kPieces;
    const int64_t pixel = pixels[row].index;
    const uint4 piece = *reinterpret_cast<const uint4*>(
        staging + staging_offset(row, lane % kPieces * kVectorBytes));
    if (pixel >= 0 && channel < last_channel) {
      *reinterpret_cast<uint4*>(static_cast<T*>(out.data) + pixel * out.channels + channel) = piece;
    }
  }
  __syncwarp();
}

template <class T>
__device__ void store_group(const TileOutput& out, uint8_t* staging, const Pixel* pixels,
                            const Rows& rows, int64_t first_channel, int group, bool is_last,
                            Group& y) {
  if (!out.has_pieces) {
    for_each(y, [&](float& value, int row, int32_t column) {
      const int64_t channel = first_channel + column;
      if (!rows.is_valid[row] || channel >= out.channels) return;
      static_cast<T*>(out.data)[rows.base[row] + channel * rows.step] = from_float<T>(value);
    });
    return;
  }
  // A run's channels start with a row, so that all of this is known when the groups are unrolled.
  constexpr int kRowChannels = kStagingRow / sizeof(T);
  const int column = group * kGroup % kRowChannels;
  stage_group<T>(staging, column * static_cast<int>(sizeof(T)), y);
  if (is_last || column + kGroup == kRowChannels) {
    flush_staging<T>(out, staging, pixels, first_channel - column,
                     min(first_channel + kGroup, out.channels));
  }
}

__device__ inline void store_values(const TileOutput& out, uint8_t* staging, const Pixel* pixels,
                                    const Rows& rows, int64_t first_channel, int group,
                                    bool is_last, Group& y) {
  switch (out.epilogue.out_type) {
    case DataType::kFloat16:
      return store_group<__half>(out, staging, pixels, rows, first_channel, group, is_last, y);
    case DataType::kBFloat16:
      return store_group<__nv_bfloat16>(out, staging, pixels, rows, first_channel, group, is_last,
                                        y);
    case DataType::kFloat32:
      return store_group<float>(out, staging, pixels, rows, first_channel, group, is_last, y);
    case DataType::kInt32:
      return store_group<int32_t>(out, staging, pixels, rows, first_channel, group, is_last, y);
    default:
      return;
  }
}

// acc: of a warp's 16 pixels and of kColumns channels from the block's channel `column`;
// warp_pixels: those pixels; warp: the number of the warp among those that call.
template <int kColumns>
__device__ void store_run(const TileOutput& out, const HaloConv& conv, int32_t column,
                          const int32_t (&acc)[kColumns / 2], const Pixel* warp_pixels, int warp) {
  const int32_t* table = shared<int32_t>(conv.at.table) + column;
  const float4* scaling = shared<float4>(conv.at.scaling) + column / 2;
  const float4* limits = shared<float4>(conv.at.limits) + column / 2;
  uint8_t* staging = shared<uint8_t>(conv.at.staging) + warp * kWarpStaging;
  int32_t first = first_channel(conv) + column;
  asm volatile("" : "+r"(first));  // Else every channel's addresses are kept from run to run.
  constexpr int kGroups = kColumns / kGroup;
  const int lane_row = threadIdx.x % kWarpSize / 4;
  const Pixel pixels[2] = {warp_pixels[lane_row], warp_pixels[lane_row + 8]};
  const Rows rows = locate_rows(out, pixels);
  void* bits = out.epilogue.out_type == DataType::kBits ? out.data : out.epilogue.bits;
  uint32_t words[kGroups][2] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t channel = first + group * kGroup;
    if (channel >= out.channels) break;
    Group y;
    scale_group<kColumns>(out, acc, group, pixels, table, scaling, y);
    if (!out.is_plain) finish_group(out, rows, channel, y);
    if (bits) pack_group(out, channel, limits + group * kGroup / 2, y, words[group]);
    const bool is_last = group + 1 == kGroups || channel + kGroup >= out.channels;
    store_values(out, staging, warp_pixels, rows, channel, group, is_last, y);
  }
  if (bits) store_words<kGroups>(out, bits, pixels, first, words);
}

}  // namespace binconv::cuda
