#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/tile_channels.cuh"
#include "cuda/tile_output.cuh"
#include "cuda/tile_staging.cuh"

// The end of the tensor-core kernels: a warp turns its 16 pixels of a run into outputs. Nothing is
// shared with other warps, so that nothing has to wait.

namespace binconv::cuda {

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

// visit(value, index) for all values of a group, with where they lie.
template <class Visit>
__device__ void for_each(const TileOutput& out, const Rows& rows, int64_t first_channel, Group& y,
                         const Visit& visit) {
  const int64_t first = first_channel + group_column(0, 0);
  const int left = static_cast<int>(min(out.channels - first, int64_t{kGroup}));
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    int64_t index = rows.base[row] + first * rows.step;
#pragma unroll
    for (int block = 0; block < kGroupBlocks; ++block) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (rows.is_valid[row] && 8 * block + c < left) visit(y[block][row][c], index);
        index += c == 0 ? rows.step : 7 * rows.step;  // Adding is quicker than multiplying.
      }
    }
  }
}

// A residual that is not staged.
__device__ inline void add_residual(const TileOutput& out, const Rows& rows, int64_t first_channel,
                                    Group& y) {
  for_each(out, rows, first_channel, y,
           [&](float& value, int64_t index) { value = add_residual(out.epilogue, index, value); });
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

// From the bits of a lane's 8 columns to their places in a group's word: two bits of every byte.
__device__ inline uint32_t spread_columns(uint32_t bits) {
  bits = (bits | bits << 12) & 0x000f000f;
  bits = (bits | bits << 6) & 0x03030303;
  return bits << threadIdx.x % 4 * 2;
}

// The bits of a group, for both rows; every lane of a row's four gets its word.
__device__ inline void pack_group(const TileOutput& out, int64_t first_channel,
                                  const float4* limits, Group& y, uint32_t (&words)[2]) {
  float hits[2] = {};  // Of the lane's columns. As floats, comparing and adding take one step each.
#pragma unroll
  for (int block = 0; block < kGroupBlocks; ++block) {
    const float4 limit = limits[group_column(block, 0) / 2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float first = passes(y[block][row][0], limit.x, limit.z) ? 1.0f : 0.0f;
      const float second = passes(y[block][row][1], limit.y, limit.w) ? 1.0f : 0.0f;
      hits[row] = __fmaf_rn(first, 1 << 2 * block, hits[row]);
      hits[row] = __fmaf_rn(second, 2 << 2 * block, hits[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const uint32_t columns = spread_columns(static_cast<uint32_t>(hits[row]));
    words[row] = join_lanes(columns) & valid_bits(out, first_channel);
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
    const uint32_t hits = ~join_lanes(spread_columns(misses));
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

template <class T>
__device__ void store_group(const TileOutput& out, const PieceRows& pieces, uint8_t* staging,
                            const Rows& rows, int64_t first_channel, int group, bool is_last,
                            Group& y) {
  if (out.has_pieces) {
    const int64_t channels = min(out.channels - first_channel, int64_t{kGroup});
    return store_pieces<T>(pieces, staging, group, is_last, static_cast<int>(channels), y);
  }
  for_each(out, rows, first_channel, y, [&](float value, int64_t index) {
    static_cast<T*>(out.data)[index] = from_float<T>(value);
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
