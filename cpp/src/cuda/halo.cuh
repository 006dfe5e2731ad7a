#pragma once

#include <algorithm>

#include "cuda/halo.h"
#include "cuda/numeric.cuh"
#include "cuda/prepared_weight.h"

// What the tensor-core kernels share on the device: the geometry of halo.h, and how sums of
// popcount(a & w) become convolution results. By docs/conventions.md,
//
//   acc = 4 * popcount(a & w) - 2 * popcount(a) + T[border class][output channel],
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
  int32_t dilation_height, dilation_width, pad_value;
  int32_t taps, chunks, group_in_channels, group_out_channels;
  int64_t prepared_channels, pixel_chunks;
  const uint4* input;
  const uint8_t* weights;
  const int32_t* tap_counts;
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

// The weights of the block's channels for one chunk and tap, atom = chunk * taps + tap;
// block_channels * 16 bytes.
__device__ inline const uint8_t* weights_at(const HaloConv& conv, int64_t atom) {
  return conv.weights + (atom * conv.prepared_channels + first_channel(conv)) * kChunkBytes;
}

// Steps of a tile: how often a stage of the halo is filled for it.
__device__ inline int32_t stage_steps(const HaloConv& conv) {
  return ceil_div(conv.chunks, conv.plan.stage_chunks);
}

// A pixel of a tile, as the epilogue needs it.
struct Pixel {
  float window;   // -2 * popcount(a) - kMagic
  int32_t table;  // Index of its border class's first entry in T.
  int32_t index;  // In the output, in pixels; negative if it is none.
};

inline HaloConv halo_conv(const Conv2dArgs& args, const HaloPlan& plan) {
  const Conv2dShape& shape = args.shape;
  const WeightShape& weight = shape.weight;
  const PreparedLayout prepared = prepared_layout(weight);
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  return {
      .plan = plan,
      .at = halo_layout(plan, weight),
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
      .dilation_height = narrow(shape.dilation_height),
      .dilation_width = narrow(shape.dilation_width),
      .pad_value = shape.pad_value,
      .taps = narrow(prepared.taps),
      .chunks = narrow(prepared.chunks),
      .group_in_channels = narrow(weight.in_channels / weight.groups),
      .group_out_channels = narrow(weight.out_channels / weight.groups),
      .prepared_channels = prepared.channels,
      .pixel_chunks = packed_bytes(weight.in_channels) / kChunkBytes,
      .input = reinterpret_cast<const uint4*>(args.input),
      .weights = args.prepared_weight,
      .tap_counts = reinterpret_cast<const int32_t*>(args.prepared_weight + prepared.bit_bytes())};
}

// Blocks walk over tiles in steps of blocks.x; blocks.y are the blocks of channels.
inline dim3 tile_blocks(const Conv2dShape& shape, const HaloPlan& plan, const HaloLimits& limits) {
  const int64_t channel_blocks = ceil_div<int64_t>(shape.weight.out_channels, plan.block_channels);
  const int64_t workers = std::max<int64_t>(1, limits.multiprocessors / channel_blocks);
  return dim3(static_cast<unsigned>(std::min(plan.tiles, workers)),
              static_cast<unsigned>(channel_blocks));
}

struct TilePosition {
  int32_t image, row, column;  // The first output pixel.
};

__device__ inline TilePosition tile_position(const HaloPlan& plan, int64_t tile) {
  const int64_t row_tile = tile / plan.column_tiles;
  const int64_t image_tile = row_tile / plan.row_tiles;
  return {static_cast<int32_t>(image_tile) * plan.tile_images,
          static_cast<int32_t>(row_tile - image_tile * plan.row_tiles) * plan.tile_rows,
          static_cast<int32_t>(tile - row_tile * plan.column_tiles) * plan.tile_columns};
}

struct AxisBorder {
  int32_t in, kernel, stride, pad, dilation, lost_before;
};

// The border class (halo.h) of a position along one axis.
__device__ inline int32_t border_class(const AxisBorder& axis, int32_t position) {
  const int32_t origin = position * axis.stride - axis.pad;
  if (origin < 0) {
    const int32_t before = min((-origin + axis.dilation - 1) / axis.dilation, axis.kernel);
    if (before > 0) return before;
  }
  const int32_t room = max(axis.in - origin, 0);
  const int32_t after = axis.kernel - min((room + axis.dilation - 1) / axis.dilation, axis.kernel);
  return after > 0 ? axis.lost_before + after : 0;
}

// Whether a tap is inside the input at the positions of a border class.
__device__ inline bool is_inside(const AxisBorder& axis, int32_t border, int32_t tap) {
  if (border <= axis.lost_before) return tap >= border;
  return tap < axis.kernel - (border - axis.lost_before);
}

__device__ inline AxisBorder row_border(const HaloConv& c) {
  return {c.in_height, c.kernel_height,   c.stride_height,
          c.pad_top,   c.dilation_height, c.plan.rows_lost_before};
}
__device__ inline AxisBorder column_border(const HaloConv& c) {
  return {c.in_width, c.kernel_width,   c.stride_width,
          c.pad_left, c.dilation_width, c.plan.columns_lost_before};
}

// Entry of T, as the bits of kMagic + T.
__device__ inline int32_t table_entry(const HaloConv& conv, int32_t border, int32_t channel) {
  const int32_t* tap_counts = shared<int32_t>(conv.at.tap_counts);
  const int32_t row_class = border / conv.plan.column_classes;
  const int32_t column_class = border - row_class * conv.plan.column_classes;
  const AxisBorder rows = row_border(conv), columns = column_border(conv);
  int32_t sum = kMagicBits;
  for (int32_t i = 0, tap = 0; i < conv.kernel_height; ++i) {
    const bool row_inside = is_inside(rows, row_class, i);
    for (int32_t j = 0; j < conv.kernel_width; ++j, ++tap) {
      const int32_t zeros =
          conv.group_in_channels - 2 * tap_counts[tap * conv.plan.block_channels + channel];
      const bool inside = row_inside && is_inside(columns, column_class, j);
      sum += inside ? zeros : -conv.pad_value * zeros;
    }
  }
  return sum;
}

__device__ inline Pixel make_pixel(const HaloConv& conv, const TilePosition& tile, int32_t flat) {
  const HaloPlan& plan = conv.plan;
  const int32_t segment = flat / plan.pitch, column = flat - segment * plan.pitch;
  const int32_t row = segment / plan.tile_images, image = segment - row * plan.tile_images;
  const int32_t n = tile.image + image, p = tile.row + row, q = tile.column + column;
  if (row >= plan.tile_rows || column >= plan.tile_columns || n >= conv.batch ||
      p >= conv.out_height || q >= conv.out_width) {
    return {0.0f, 0, -1};
  }
  const int32_t* pixel_counts = shared<int32_t>(conv.at.pixel_counts);
  int32_t count = 0;
  for (int32_t tap = 0; tap < conv.taps; ++tap)
    count += pixel_counts[flat + conv.tables.shifts[tap]];
  int32_t border = 0;
  if (conv.pad_value != -1) {
    border = border_class(row_border(conv), p) * plan.column_classes +
             border_class(column_border(conv), q);
  }
  return {-2.0f * count - kMagic, border * plan.block_channels,
          (n * conv.out_height + p) * conv.out_width + q};
}

// The following are work for `threads` threads, of which this one is number `thread`.

__device__ inline void make_table(const HaloConv& conv, int thread, int threads) {
  const int32_t channels = conv.plan.block_channels;
  const int32_t classes = conv.plan.row_classes * conv.plan.column_classes;
  for (int32_t i = thread; i < classes * channels; i += threads) {
    shared<int32_t>(conv.at.table)[i] = table_entry(conv, i / channels, i % channels);
  }
}

// The bits of each pixel in a stage of the halo, added up over the steps of a tile.
__device__ inline void count_pixels(const HaloConv& conv, int slot, bool is_first_step, int thread,
                                    int threads) {
  const HaloPlan& plan = conv.plan;
  const uint4* halo = shared<uint4>(conv.at.halo + slot * plan.stage_bytes());
  int32_t* counts = shared<int32_t>(conv.at.pixel_counts);
  const int32_t pixels = plan.phases() * plan.region_pixels;
  for (int32_t i = thread; i < pixels; i += threads) {
    int32_t sum = is_first_step ? 0 : counts[i];
    for (int32_t chunk = 0; chunk < plan.stage_chunks; ++chunk) {
      const uint4 v = halo[chunk * pixels + i];
      sum += __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
    }
    counts[i] = sum;
  }
}

__device__ inline Pixel* pixels_at(const HaloConv& conv, int slot, int32_t run) {
  return shared<Pixel>(conv.at.pixels) + (slot * conv.plan.runs + run) * kRunPixels;
}

__device__ inline void make_pixels(const HaloConv& conv, const TilePosition& tile, int slot,
                                   int thread, int threads) {
  Pixel* pixels = pixels_at(conv, slot, 0);
  for (int32_t i = thread; i < conv.plan.runs * kRunPixels; i += threads) {
    pixels[i] = make_pixel(conv, tile, i);
  }
}

// What has to be zero in shared memory and no copy writes: the padding behind each halo, and the
// weights of a lone tap's partner.
__device__ inline void write_zeros(const HaloConv& conv, int thread, int threads) {
  const HaloPlan& plan = conv.plan;
  const int32_t regions = kHaloStages * plan.stage_chunks * plan.phases();
  const int32_t tail = plan.region_pixels - plan.halo_pixels();
  for (int32_t i = thread; i < regions * tail; i += threads) {
    const int32_t region = i / tail;
    const int32_t pixel = plan.halo_pixels() + i - region * tail;
    shared<uint4>(conv.at.halo)[region * plan.region_pixels + pixel] = uint4{};
  }
  if (plan.is_streamed) return;
  uint4* zeros = shared<uint4>(conv.at.weights) + conv.chunks * conv.taps * plan.block_channels;
  for (int32_t i = thread; i < plan.block_channels; i += threads) zeros[i] = uint4{};
}

}  // namespace binconv::cuda
