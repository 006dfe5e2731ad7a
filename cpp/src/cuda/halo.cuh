#pragma once

#include <algorithm>

#include "cuda/divisor.cuh"
#include "cuda/halo.h"
#include "cuda/numeric.cuh"
#include "cuda/prepared_weight.h"
#include "cuda/tap_bits.cuh"

// What the tensor-core kernels share on the device: the geometry of halo.h, and how sums of
// popcount(a & w) become convolution results. By docs/conventions.md,
//
//   acc = 4 * popcount(a & w) - 2 * popcount(a) + T[entry of the border][output channel],
//
// popcount(a) over the window of the pixel. T and the windows' counts are exact in a float's
// mantissa, so the integers are carried there: the float kMagic + i has the bits kMagicBits + i for
// every |i| < 2^22.

namespace binconv::cuda {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t kMagicBits = 0x4b400000;

// A convolution as a kernel parameter.
struct HaloConv {
  HaloPlan plan;
  HaloLayout at;
  HaloTables tables;
  int32_t batch, in_height, in_width, out_height, out_width;
  int32_t kernel_height, kernel_width, stride_height, stride_width, pad_top, pad_left;
  int32_t pad_value;
  Divisor pitch, tile_images, column_tiles, row_tiles;
  int32_t taps, chunks, group_in_channels, group_out_channels;
  int64_t pixel_chunks;
  const uint4* input;
  const uint4* weights;
  TapBits tap_bits;
};

extern __shared__ __align__(1024) uint8_t shared_memory[];

template <class T>
__device__ T* shared(int32_t offset) {
  return reinterpret_cast<T*>(shared_memory + offset);
}

// An address in shared memory in units of 16 bytes.
__device__ inline uint32_t shared_unit(int32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory + offset)) / kChunkBytes;
}

// Of the thread block.
__device__ inline int32_t first_channel(const HaloConv& conv) {
  return blockIdx.y * conv.plan.block_channels;
}

// Of the chunks of the input that the block's group of channels reads.
__device__ inline int32_t first_chunk(const HaloConv& conv) {
  return first_channel(conv) / conv.group_out_channels * conv.chunks;
}

// Steps of a tile: how often a stage of the halo is filled for it.
__device__ inline int32_t stage_steps(const HaloConv& conv) {
  return ceil_div(conv.chunks, conv.plan.stage_chunks);
}

inline HaloConv halo_conv(const Conv2dArgs& args, const HaloPlan& plan) {
  const Conv2dShape& shape = args.shape;
  const WeightShape& weight = shape.weight;
  const PreparedLayout prepared = prepared_layout(weight);
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  return {
      .plan = plan,
      .at = halo_layout(plan),
      .tables = halo_tables(shape, plan),
      .batch = narrow(shape.batch),
      .in_height = narrow(shape.in_height),
      .in_width = narrow(shape.in_width),
      .out_height = narrow(shape.out_height()),
      .out_width = narrow(shape.out_width()),
      .kernel_height = narrow(weight.kernel_height),
      .kernel_width = narrow(weight.kernel_width),
      .stride_height = narrow(shape.stride_height),
      .stride_width = narrow(shape.stride_width),
      .pad_top = narrow(shape.pad_top),
      .pad_left = narrow(shape.pad_left),
      .pad_value = shape.pad_value,
      .pitch = Divisor(plan.pitch),
      .tile_images = Divisor(plan.tile_images),
      .column_tiles = Divisor(plan.column_tiles),
      .row_tiles = Divisor(plan.row_tiles),
      .taps = narrow(prepared.taps),
      .chunks = narrow(prepared.chunks),
      .group_in_channels = narrow(weight.in_channels / weight.groups),
      .group_out_channels = narrow(weight.out_channels / weight.groups),
      .pixel_chunks = packed_bytes(weight.in_channels) / kChunkBytes,
      .input = reinterpret_cast<const uint4*>(args.input),
      .weights = reinterpret_cast<const uint4*>(args.prepared_weight),
      .tap_bits = {reinterpret_cast<const int32_t*>(args.prepared_weight + prepared.bit_bytes()),
                   prepared.channels, narrow(weight.kernel_width)}};
}

// Blocks walk over tiles in steps of blocks.x; blocks.y are the blocks of channels.
inline dim3 tile_blocks(const Conv2dShape& shape, const HaloPlan& plan, const HaloLimits& limits) {
  const int64_t channel_blocks = ceil_div<int64_t>(shape.weight.out_channels, plan.block_channels);
  const int64_t workers = std::max<int64_t>(1, limits.multiprocessors / channel_blocks);
  return dim3(static_cast<unsigned>(std::min<int64_t>(plan.tiles, workers)),
              static_cast<unsigned>(channel_blocks));
}

struct TilePosition {
  int32_t image, row, column;  // The first output pixel.
};

__device__ inline TilePosition tile_position(const HaloConv& conv, int32_t tile) {
  const auto [row_tile, column] = conv.column_tiles.divide(tile);
  const auto [image, row] = conv.row_tiles.divide(row_tile);
  return {static_cast<int32_t>(image) * conv.plan.tile_images,
          static_cast<int32_t>(row) * conv.plan.tile_rows,
          static_cast<int32_t>(column) * conv.plan.tile_columns};
}

// Where in a tile's halo, or among its output pixels, a number of halo.h's order is.
__device__ inline TilePosition halo_position(const HaloConv& conv, int32_t flat) {
  const auto [segment, column] = conv.pitch.divide(flat);
  const auto [row, image] = conv.tile_images.divide(segment);
  return {static_cast<int32_t>(image), static_cast<int32_t>(row), static_cast<int32_t>(column)};
}

// Of T, for an entry of the border and one of all channels: the bits of kMagic + T.
__device__ inline int32_t table_entry(const HaloConv& conv, int32_t entry, int32_t channel) {
  const InsideTaps& taps = conv.tables.inside[entry];
  const TapRange rows = {taps.first_row, taps.end_row};
  const TapRange columns = {taps.first_column, taps.end_column};
  const auto zeros = [&](const TapRange& r, const TapRange& c) {
    const int32_t taps = (r.end - r.first) * (c.end - c.first);
    return conv.group_in_channels * taps - 2 * conv.tap_bits.count(r, c, channel);
  };
  const int32_t inside = zeros(rows, columns);
  if (conv.pad_value == 0) return kMagicBits + inside;
  const int32_t all = zeros({0, conv.kernel_height}, {0, conv.kernel_width});
  // Zero bits outside the image are -1 as they are.
  return kMagicBits + (conv.pad_value == -1 ? all : 2 * inside - all);
}

// No branches, so that several of these overlap.
__device__ inline Pixel locate_pixel(const HaloConv& conv, const TilePosition& tile, int32_t flat) {
  const HaloPlan& plan = conv.plan;
  const TilePosition in_tile = halo_position(conv, flat);
  const int32_t n = tile.image + in_tile.image, p = tile.row + in_tile.row;
  const int32_t q = tile.column + in_tile.column;
  const bool is_valid = (in_tile.row < plan.tile_rows) & (in_tile.column < plan.tile_columns) &
                        (n < conv.batch) & (p < conv.out_height) & (q < conv.out_width);
  const int32_t entry =
      plan.row_border.entry(p) * plan.column_border.entries + plan.column_border.entry(q);
  return {is_valid ? entry * plan.block_channels : 0,
          is_valid ? (n * conv.out_height + p) * conv.out_width + q : -1};
}

// Of a halo stage.
__device__ inline Pixel* listed_pixels(const HaloConv& conv, int slot) {
  return shared<Pixel>(conv.at.pixels) + slot * conv.plan.runs * kRunPixels;
}

// The following are work for `threads` threads, of which this one is number `thread`.

// T of the block's channels. threads: a multiple of these channels.
__device__ inline void make_table(const HaloConv& conv, int thread, int threads) {
  const int32_t channels = conv.plan.block_channels, channel = thread % channels;
  const int32_t entries = conv.plan.row_border.entries * conv.plan.column_border.entries;
#pragma unroll 4  // So that what they load comes at the same time.
  for (int32_t entry = thread / channels; entry < entries; entry += threads / channels) {
    shared<int32_t>(conv.at.table)[entry * channels + channel] =
        table_entry(conv, entry, first_channel(conv) + channel);
  }
}

// What no copy writes to shared memory: zeros in the padding behind each halo and in the weights of
// a lone tap's partner, and the columns of ones.
__device__ inline void write_constants(const HaloConv& conv, int thread, int threads) {
  const HaloPlan& plan = conv.plan;
  const int32_t regions = plan.halo_stages * plan.stage_chunks * plan.phases();
  const int32_t tail = plan.region_pixels - plan.halo_pixels();
  for (int32_t i = thread; i < regions * tail; i += threads) {
    const int32_t region = i / tail;
    const int32_t pixel = plan.halo_pixels() + i - region * tail;
    shared<uint4>(conv.at.halo)[region * plan.region_pixels + pixel] = uint4{};
  }
  uint4* weights = shared<uint4>(conv.at.weights);
  const int32_t first_zero = plan.is_streamed ? plan.part_taps : conv.taps;
  for (int32_t i = thread; i < plan.columns * plan.parts * plan.part_chunks; i += threads) {
    // Of one chunk in a column.
    const int32_t group = i / kCoreRows / plan.part_chunks;
    const bool is_one = group % (plan.columns / kCoreRows) >= plan.block_channels / kCoreRows;
    uint4* rows = weights + i / kCoreRows * plan.part_taps * kCoreRows + i % kCoreRows;
    for (int32_t tap = is_one ? 0 : first_zero; tap < plan.part_taps; ++tap) {
      const uint32_t word = tap < first_zero ? ~0u : 0;
      rows[tap * kCoreRows] = {word, word, word, word};
    }
  }
}

}  // namespace binconv::cuda
