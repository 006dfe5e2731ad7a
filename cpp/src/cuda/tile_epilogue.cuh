#pragma once

#include "binconv/conv2d.h"
#include "check.h"
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

// What the epilogue needs of the block's channels, in shared memory. For two channels at a time:
// scales, then biases; and thresholds, then signs that turn y <= threshold into y >= threshold. For
// all of them: the activation's first shifts, slopes, second shifts.
// Work for `threads` threads, of which this one is number `thread`.
__device__ inline void load_channels(const TileOutput& out, const HaloConv& conv, int thread,
                                     int threads) {
  float* scaling = shared<float>(conv.at.scaling);
  float* limits = shared<float>(conv.at.limits);
  float* activation = shared<float>(conv.at.activation);
  const int32_t channels = conv.plan.block_channels;
  for (int32_t i = thread; i < channels; i += threads) {
    const int64_t channel = first_channel(conv) + i;
    const ChannelTerms terms =
        channel < out.channels ? load_channel_terms(out.epilogue, channel) : ChannelTerms{};
    const int32_t at = i / 2 * 4 + i % 2;
    scaling[at] = terms.scale, scaling[at + 2] = terms.bias;
    limits[at] = terms.below ? -terms.threshold : terms.threshold;
    limits[at + 2] = terms.below ? -0.0f : 0.0f;
    activation[i] = terms.activation.in_shift;
    activation[channels + i] = terms.activation.slope;
    activation[2 * channels + i] = terms.activation.out_shift;
  }
}

__device__ inline bool passes(float y, float limit, float sign) {
  return __int_as_float(__float_as_int(y) ^ __float_as_int(sign)) >= limit;
}

// Where out.is_bits, y rises or falls with acc, and all that y is needed for is where it passes the
// threshold: bit = (acc >= limit) != is_flipped.
struct BitLimit {
  int32_t limit;
  bool is_flipped;
};

__device__ inline BitLimit find_bit_limit(const ChannelTerms& terms, bool clamp) {
  const auto bit = [&](int32_t acc) {
    const float y = scale_and_bias(clamp ? max(acc, 0) : acc, terms);
    return passes(y, terms.threshold, terms.below);
  };
  int32_t below = -(1 << 22), limit = 1 << 22;  // Beyond all sums.
  const bool is_flipped = bit(below);
  while (limit - below > 1) {
    const int32_t middle = below + (limit - below) / 2;
    (bit(middle) == is_flipped ? below : limit) = middle;
  }
  return {limit, is_flipped};
}

// The block's, in shared memory.
struct BitLimits {
  int32_t* limits;       // Of each channel.
  uint32_t* flipped;     // Of each 32 channels, a word of bits.
  uint32_t* not_rising;  // Of each 32 channels: whether y neither rises nor falls in some channel.
  int32_t* are_used;     // Whether T (halo.cuh) has the limits subtracted, and no kMagicBits.
};

__device__ inline BitLimits bit_limits(const HaloConv& conv) {
  const int32_t channels = conv.plan.block_channels;
  int32_t* limits = shared<int32_t>(conv.at.bit_limits);
  uint32_t* words = reinterpret_cast<uint32_t*>(limits + channels);
  return {limits, words, words + channels / kGroup,
          reinterpret_cast<int32_t*>(words + 2 * channels / kGroup)};
}

// As load_channels.
__device__ inline void make_bit_limits(const TileOutput& out, const HaloConv& conv, int thread,
                                       int threads) {
  const BitLimits to = bit_limits(conv);
  for (int32_t i = thread; i < conv.plan.block_channels; i += threads) {
    const int64_t channel = first_channel(conv) + i;
    const ChannelTerms terms =
        channel < out.channels ? load_channel_terms(out.epilogue, channel) : ChannelTerms{};
    const BitLimit found = find_bit_limit(terms, out.epilogue.clamp);
    to.limits[i] = found.limit;
    const uint32_t flipped = __ballot_sync(kWholeWarp, found.is_flipped);
    const uint32_t not_rising = __ballot_sync(kWholeWarp, isinf(terms.scale));  // 0 gives NaN.
    if (i % kGroup == 0) to.flipped[i / kGroup] = flipped, to.not_rising[i / kGroup] = not_rising;
  }
}

__device__ inline bool can_use_bit_limits(const TileOutput& out, const HaloConv& conv) {
  bool can = out.is_bits;
  for (int32_t i = 0; can && i < conv.plan.block_channels / kGroup; ++i) {
    can = bit_limits(conv).not_rising[i] == 0;
  }
  return can;
}

// All that the epilogue needs of the block's channels: work for `threads` threads, a multiple of
// the channels. get_tap_counts(): returns when they are in shared memory; synchronize(): waits for
// all these threads.
template <class GetTapCounts, class Synchronize>
__device__ void prepare_channels(const TileConv& args, int thread, int threads,
                                 const GetTapCounts& get_tap_counts,
                                 const Synchronize& synchronize) {
  const auto& [conv, out] = args;
  load_channels(out, conv, thread, threads);
  if (out.is_bits) make_bit_limits(out, conv, thread, threads);
  get_tap_counts();
  sum_tap_counts(conv, thread, threads);
  synchronize();
  const BitLimits bits = bit_limits(conv);
  const bool are_used = can_use_bit_limits(out, conv);
  if (thread == 0) *bits.are_used = are_used;
  const int32_t channel = thread % conv.plan.block_channels;
  make_table(conv, thread, threads, are_used ? -kMagicBits - bits.limits[channel] : 0);
  synchronize();
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

// From accumulators to scale * acc + bias, or to acc where the output is int32.
template <int kColumns, bool kIsSimple>
__device__ void scale_group(const TileOutput& out, const WarpRun<kColumns>& run, int group,
                            Group& y) {
  const bool is_integer = !kIsSimple && out.epilogue.out_type == DataType::kInt32;
  const bool is_clamped = !kIsSimple && out.epilogue.clamp;
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int32_t column = group * kGroup + group_column(block, 0);
    const float4 terms = run.scaling[column / 2];  // Scales, then biases of two channels.
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Pixel& pixel = run.pixels[row];
      const int2 t = *reinterpret_cast<const int2*>(run.table + pixel.table + column);
      const int32_t* d = run.acc + 4 * (group * kGroupBlocks + block) + 2 * row;
      float a0 = __int_as_float(4 * d[0] + t.x) + pixel.window;
      float a1 = __int_as_float(4 * d[1] + t.y) + pixel.window;
      if (is_clamped) a0 = fmaxf(a0, 0.0f), a1 = fmaxf(a1, 0.0f);
      y[block][row][0] = is_integer ? a0 : __fmaf_rn(a0, terms.x, terms.z);
      y[block][row][1] = is_integer ? a1 : __fmaf_rn(a1, terms.y, terms.w);
    }
  }
}

// A residual that is not staged.
__device__ inline void add_residual(const TileOutput& out, const Rows& rows, int64_t first_channel,
                                    Group& y) {
  for_each(y, [&](float& value, int row, int32_t column) {
    const int64_t channel = first_channel + column;
    if (!rows.is_valid[row] || channel >= out.channels) return;
    value = add_residual(out.epilogue, rows.base[row] + channel * rows.step, value);
  });
}

// terms: from the group's first channel on; block_channels from one kind of term to the next.
__device__ inline void activate_group(const TileOutput& out, const float* terms,
                                      int32_t block_channels, Group& y) {
  const bool is_relu = !out.epilogue.activation.slope;
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const float* at = terms + group_column(block, 0);
    const float2 in = *reinterpret_cast<const float2*>(at);
    const float2 slope = *reinterpret_cast<const float2*>(at + block_channels);
    const float2 shift = *reinterpret_cast<const float2*>(at + 2 * block_channels);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float (&pair)[2] = y[block][row];
      pair[0] = apply_activation(pair[0], {in.x, slope.x, shift.x, is_relu});
      pair[1] = apply_activation(pair[1], {in.y, slope.y, shift.y, is_relu});
    }
  }
}

// Of the channels from first_channel on, a word: those that exist.
__device__ inline uint32_t valid_bits(const TileOutput& out, int64_t first_channel) {
  const int64_t left = out.channels - first_channel;
  return left >= kGroup ? ~0u : (1u << left) - 1;
}

// The bits of a row's four lanes together.
__device__ inline uint32_t join_lanes(uint32_t word) {
  word |= __shfl_xor_sync(kWholeWarp, word, 1);
  return word | __shfl_xor_sync(kWholeWarp, word, 2);
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
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    words[row] = join_lanes(words[row]) & valid_bits(out, first_channel);
  }
}

// The same from accumulators, where the block's bit limits are used.
template <int kColumns>
__device__ void compare_group(const TileOutput& out, const WarpRun<kColumns>& run, int group,
                              uint32_t flipped, uint32_t (&words)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const Pixel& pixel = run.pixels[row];
    const int32_t window = static_cast<int32_t>(pixel.window + kMagic);
    uint32_t misses = 0;  // Of the lane's columns, the last one first: the signs of acc - limit.
#pragma unroll
    for (int block = kGroupBlocks - 1; block >= 0; --block) {
      const int32_t column = group * kGroup + group_column(block, 0);
      const int2 t = *reinterpret_cast<const int2*>(run.table + pixel.table + column);
      const int32_t* d = run.acc + 4 * (group * kGroupBlocks + block) + 2 * row;
      misses = __funnelshift_l(4 * d[1] + t.y + window, misses, 1);
      misses = __funnelshift_l(4 * d[0] + t.x + window, misses, 1);
    }
    // To their columns: two bits of every byte.
    misses = (misses | misses << 12) & 0x000f000f;
    misses = (misses | misses << 6) & 0x03030303;
    const uint32_t hits = ~join_lanes(misses << threadIdx.x % 4 * 2);
    words[row] = (hits ^ flipped) & valid_bits(out, run.first_channel + group * kGroup);
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
__device__ void stage_group(uint8_t* staging, uint32_t lane, int first_byte, Group& y) {
  const int row = static_cast<int>(lane / 4);
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int byte = first_byte + static_cast<int>((8 * block + 2 * (lane % 4)) * sizeof(T));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Vector<T, 2> pair = {{from_float<T>(y[block][i][0]), from_float<T>(y[block][i][1])}};
      store_vector(reinterpret_cast<T*>(staging + staging_offset(row + 8 * i, byte)), pair);
    }
  }
}

// Where the lane stores pieces of its share of the warp's rows: rows lane / 8 + 4 * i, each from
// the run's first channel on, and there piece lane % 8. Null where there is no pixel.
constexpr int kPieces = kStagingRow / kVectorBytes;
constexpr int kFlushRows = kWarpSize / kPieces;  // That a warp stores at a time.
constexpr int kLaneRows = kWarpPixels / kFlushRows;
struct PieceRows {
  uint8_t* at[kLaneRows];
};

template <int kColumns>
__device__ PieceRows locate_pieces(const TileOutput& out, const WarpRun<kColumns>& run) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row_bytes = out.channels * out.value_bytes;
  uint8_t* data = static_cast<uint8_t*>(out.data) + run.first_channel * out.value_bytes +
                  lane % kPieces * kVectorBytes;
  PieceRows rows;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int64_t pixel = run.warp_pixels[lane / kPieces + i * kFlushRows].index;
    rows.at[i] = pixel < 0 ? nullptr : data + pixel * row_bytes;
  }
  return rows;
}

__device__ inline int64_t residual_distance(const TileOutput& out) {
  return static_cast<const uint8_t*>(out.epilogue.residual) - static_cast<uint8_t*>(out.data);
}

// The residual's pieces of a staging row, on their way to where the values are staged: they wait in
// registers while those before them are used.
struct Residual {
  uint4 pieces[kLaneRows];
};

// Loads the first `bytes` bytes of the staging rows that start `offset` bytes behind the run's
// first channel. The residual lies like the output, `distance` bytes further.
__device__ inline void load_residual(const PieceRows& rows, int64_t distance, int offset,
                                     int64_t bytes, Residual& residual) {
  const int byte = threadIdx.x % kWarpSize % kPieces * kVectorBytes;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const uint8_t* at = rows.at[i] + distance + offset;
    residual.pieces[i] = rows.at[i] && byte < bytes ? *reinterpret_cast<const uint4*>(at) : uint4{};
  }
}

__device__ inline void stage_residual(const Residual& residual, uint8_t* staging) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int row = lane / kPieces + i * kFlushRows;
    const int to = staging_offset(row, lane % kPieces * kVectorBytes);
    *reinterpret_cast<uint4*>(staging + to) = residual.pieces[i];
  }
  __syncwarp();
}

// For the groups of a run in their order. The residual of a value is staged where stage_group will
// put that value.
template <class T>
__device__ void add_staged_residual(const TileOutput& out, const PieceRows& rows,
                                    Residual& residual, uint8_t* staging, int64_t first_channel,
                                    int group, Group& y) {
  constexpr int kRowChannels = kStagingRow / sizeof(T), kSize = sizeof(T);
  const int column = group * kGroup % kRowChannels;
  if (column == 0) {
    stage_residual(residual, staging);
    load_residual(rows, residual_distance(out), (group * kGroup + kRowChannels) * kSize,
                  (out.channels - first_channel - kRowChannels) * kSize, residual);
  }
  uint32_t lane = threadIdx.x % kWarpSize;
  asm volatile("" : "+r"(lane));  // As in store_run.
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const int byte = (column + 8 * block + 2 * static_cast<int>(lane % 4)) * kSize;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = staging_offset(static_cast<int>(lane / 4) + 8 * i, byte);
      const Vector<T, 2> pair = load_vector<2>(reinterpret_cast<const T*>(staging + at));
      y[block][i][0] = __fadd_rn(y[block][i][0], to_float(pair.values[0]));
      y[block][i][1] = __fadd_rn(y[block][i][1], to_float(pair.values[1]));
    }
  }
}

__device__ inline void add_staged_residual(const TileOutput& out, const PieceRows& rows,
                                           Residual& residual, uint8_t* staging,
                                           int64_t first_channel, int group, Group& y) {
  switch (out.epilogue.residual_type) {
    case DataType::kFloat16:
      return add_staged_residual<__half>(out, rows, residual, staging, first_channel, group, y);
    case DataType::kBFloat16:
      return add_staged_residual<__nv_bfloat16>(out, rows, residual, staging, first_channel, group,
                                                y);
    default:
      return add_staged_residual<float>(out, rows, residual, staging, first_channel, group, y);
  }
}

// Stores the first `bytes` bytes of the staged rows, `offset` bytes behind the run's first channel.
__device__ inline void flush_staging(const PieceRows& rows, const uint8_t* staging, int offset,
                                     int bytes) {
  const int lane = threadIdx.x % kWarpSize;
  const int byte = lane % kPieces * kVectorBytes;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int row = lane / kPieces + i * kFlushRows;
    const uint4 piece = *reinterpret_cast<const uint4*>(staging + staging_offset(row, byte));
    if (rows.at[i] && byte < bytes) *reinterpret_cast<uint4*>(rows.at[i] + offset) = piece;
  }
  __syncwarp();
}

// Of a group in pieces. channels: how many of its channels there are.
template <class T>
__device__ void store_pieces(const PieceRows& rows, uint8_t* staging, int group, bool is_last,
                             int channels, Group& y) {
  uint32_t lane = threadIdx.x % kWarpSize;
  asm volatile("" : "+r"(lane));  // As in store_run.
  // A run's channels start with a row, so that all of this is known when the groups are unrolled.
  constexpr int kRowChannels = kStagingRow / sizeof(T), kSize = sizeof(T);
  const int column = group * kGroup % kRowChannels;
  stage_group<T>(staging, lane, column * kSize, y);
  if (is_last || column + kGroup == kRowChannels) {
    flush_staging(rows, staging, (group * kGroup - column) * kSize, (column + channels) * kSize);
  }
}

template <class T>
__device__ void store_group(const TileOutput& out, const PieceRows& pieces, uint8_t* staging,
                            const Rows& rows, int64_t first_channel, int group, bool is_last,
                            Group& y) {
  if (out.has_pieces) {
    const int64_t channels = min(out.channels - first_channel, int64_t{kGroup});
    return store_pieces<T>(pieces, staging, group, is_last, static_cast<int>(channels), y);
  }
  for_each(y, [&](float& value, int row, int32_t column) {
    const int64_t channel = first_channel + column;
    if (!rows.is_valid[row] || channel >= out.channels) return;
    static_cast<T*>(out.data)[rows.base[row] + channel * rows.step] = from_float<T>(value);
  });
}

__device__ inline void store_values(const TileOutput& out, const PieceRows& pieces,
                                    uint8_t* staging, const Rows& rows, int64_t first_channel,
                                    int group, bool is_last, Group& y) {
  const auto store = [&](auto tag) {
    using T = typename decltype(tag)::type;
    store_group<T>(out, pieces, staging, rows, first_channel, group, is_last, y);
  };
  switch (out.epilogue.out_type) {
    case DataType::kFloat16:
      return store(std::type_identity<__half>{});
    case DataType::kBFloat16:
      return store(std::type_identity<__nv_bfloat16>{});
    case DataType::kFloat32:
      return store(std::type_identity<float>{});
    case DataType::kInt32:
      return store(std::type_identity<int32_t>{});
    default:
      return;
  }
}

// Where out.is_simple and all channels exist: the common case, in which nothing is decided for each
// value or group.
template <class T, int kColumns>
__device__ void store_simple_run(const TileOutput& out, const WarpRun<kColumns>& run) {
  const PieceRows rows = locate_pieces(out, run);
#pragma unroll
  for (int group = 0; group < kColumns / kGroup; ++group) {
    Group y;
    scale_group<kColumns, true>(out, run, group, y);
    store_pieces<T>(rows, run.staging, group, group + 1 == kColumns / kGroup, kGroup, y);
  }
}

template <int kColumns>
__device__ void store_compared_run(const TileOutput& out, const WarpRun<kColumns>& run,
                                   const uint32_t* flipped) {
  constexpr int kGroups = kColumns / kGroup;
  uint32_t words[kGroups][2] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    if (run.first_channel + group * kGroup >= out.channels) break;
    compare_group(out, run, group, flipped[group], words[group]);
  }
  store_words<kGroups>(out, out.data, run.pixels, run.first_channel, words);
}

template <int kColumns>
__device__ void store_any_run(const TileOutput& out, const WarpRun<kColumns>& run) {
  constexpr int kGroups = kColumns / kGroup;
  const Rows rows = locate_rows(out, run.pixels);
  const PieceRows pieces = locate_pieces(out, run);
  Residual residual;
  if (out.stages_residual) {
    load_residual(pieces, residual_distance(out), 0,
                  (out.channels - run.first_channel) * out.value_bytes, residual);
  }
  void* bits = out.epilogue.out_type == DataType::kBits ? out.data : out.epilogue.bits;
  uint32_t words[kGroups][2] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t channel = run.first_channel + group * kGroup;
    if (channel >= out.channels) break;
    Group y;
    scale_group<kColumns, false>(out, run, group, y);
    if (out.stages_residual) {
      add_staged_residual(out, pieces, residual, run.staging, channel, group, y);
    } else if (out.epilogue.residual) {
      add_residual(out, rows, channel, y);
    }
    if (out.epilogue.activation.enabled) {
      activate_group(out, run.activation + group * kGroup, run.block_channels, y);
    }
    if (bits) pack_group(out, channel, run.limits + group * kGroup / 2, y, words[group]);
    const bool is_last = group + 1 == kGroups || channel + kGroup >= out.channels;
    store_values(out, pieces, run.staging, rows, channel, group, is_last, y);
  }
  if (bits) store_words<kGroups>(out, bits, run.pixels, run.first_channel, words);
}

// acc: of a warp's 16 pixels and of kColumns channels from the block's channel `column`;
// warp_pixels: those pixels; warp: the number of the warp among those that call.
template <int kColumns>
__device__ void store_run(const TileOutput& out, const HaloConv& conv, int32_t column,
                          const int32_t (&acc)[kColumns / 2], const Pixel* warp_pixels, int warp) {
  const int lane_row = threadIdx.x % kWarpSize / 4;
  int32_t first = first_channel(conv) + column;
  asm volatile("" : "+r"(first));  // Else every channel's addresses are kept from run to run.
  const WarpRun<kColumns> run = {.acc = acc,
                                 .warp_pixels = warp_pixels,
                                 .pixels = {warp_pixels[lane_row], warp_pixels[lane_row + 8]},
                                 .table = shared<int32_t>(conv.at.table) + column,
                                 .scaling = shared<float4>(conv.at.scaling) + column / 2,
                                 .limits = shared<float4>(conv.at.limits) + column / 2,
                                 .activation = shared<float>(conv.at.activation) + column,
                                 .block_channels = conv.plan.block_channels,
                                 .staging = shared<uint8_t>(conv.at.staging) + warp * kWarpStaging,
                                 .first_channel = first};
  const BitLimits limits = bit_limits(conv);
  if (out.is_bits && *limits.are_used) {
    return store_compared_run(out, run, limits.flipped + column / kGroup);
  }
  if (!out.is_simple || first + kColumns > out.channels) return store_any_run(out, run);
  switch (out.epilogue.out_type) {
    case DataType::kFloat16:
      return store_simple_run<__half>(out, run);
    case DataType::kBFloat16:
      return store_simple_run<__nv_bfloat16>(out, run);
    default:
      return store_simple_run<float>(out, run);
  }
}

}  // namespace binconv::cuda
