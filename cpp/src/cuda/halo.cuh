#pragma once

#include <algorithm>

#include "cuda/divisor.cuh"
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
  int32_t pad_value;
  Divisor dilation_height, dilation_width, pitch, tile_images;
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
  const auto dilation = [](int64_t value, int64_t kernel) {  // That of a single tap can be huge.
    return Divisor(kernel == 1 ? 1 : static_cast<uint32_t>(value));
  };
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
      .pad_value = shape.pad_value,
      .dilation_height = dilation(shape.dilation_height, weight.kernel_height),
      .dilation_width = dilation(shape.dilation_width, weight.kernel_width),
      .pitch = Divisor(plan.pitch),
      .tile_images = Divisor(plan.tile_images),
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
  return dim3(static_cast<unsigned>(std::min<int64_t>(plan.tiles, workers)),
              static_cast<unsigned>(channel_blocks));
}

struct TilePosition {
  int32_t image, row, column;  // The first output pixel.
};

__device__ inline TilePosition tile_position(const HaloPlan& plan, int32_t tile) {
  const int32_t row_tile = tile / plan.column_tiles;
  const int32_t image_tile = row_tile / plan.row_tiles;
  return {image_tile * plan.tile_images, (row_tile - image_tile * plan.row_tiles) * plan.tile_rows,
          (tile - row_tile * plan.column_tiles) * plan.tile_columns};
}

// Where in a tile's halo, or among its output pixels, a number of halo.h's order is.
__device__ inline TilePosition halo_position(const HaloConv& conv, int32_t flat) {
  const auto [segment, column] = conv.pitch.divide(flat);
  const auto [row, image] = conv.tile_images.divide(segment);
  return {static_cast<int32_t>(image), static_cast<int32_t>(row), static_cast<int32_t>(column)};
}

struct AxisBorder {
  int32_t in, kernel, stride, pad, lost_before;
  Divisor dilation;
};

__device__ inline AxisBorder row_border(const HaloConv& c) {
  return {c.in_height, c.kernel_height,         c.stride_height,
          c.pad_top,   c.plan.rows_lost_before, c.dilation_height};
}
__device__ inline AxisBorder column_border(const HaloConv& c) {
  return {c.in_width,      c.kernel_width, c.stride_width, c.pad_left, c.plan.columns_lost_before,
          c.dilation_width};
}

// The border class (halo.h) of a position along one axis.
__device__ inline int32_t border_class(const AxisBorder& axis, int32_t position) {
  const int32_t origin = position * axis.stride - axis.pad;
  const int32_t dilation = axis.dilation.value;
  const auto taps_within = [&](int32_t extent) {
    const int32_t cut = min(max(extent, 0), axis.kernel * dilation);
    return static_cast<int32_t>(axis.dilation.divide(cut + dilation - 1).quotient);
  };
  const int32_t before = taps_within(-origin);
  const int32_t after = axis.kernel - taps_within(axis.in - origin);
  return before > 0 ? before : after > 0 ? axis.lost_before + after : 0;
}

// The taps that are inside the input at the positions of a border class: first <= tap < end.
struct TapRange {
  int32_t first, end;
};
__device__ inline TapRange taps_inside(const AxisBorder& axis, int32_t border) {
  if (border <= axis.lost_before) return {border, axis.kernel};
  return {0, axis.kernel - (border - axis.lost_before)};
}

// Of one of the block's channels and the taps before `row` and `column`; after sum_tap_counts.
__device__ inline int32_t tap_sum(const HaloConv& conv, int32_t row, int32_t column,
                                  int32_t channel) {
  if (row == 0 || column == 0) return 0;
  const int32_t tap = (row - 1) * conv.kernel_width + column - 1;
  return shared<int32_t>(conv.at.tap_counts)[tap * conv.plan.block_channels + channel];
}

// Entry of T, as the bits of kMagic + T.
__device__ inline int32_t table_entry(const HaloConv& conv, int32_t border, int32_t channel) {
  const int32_t row_class = border / conv.plan.column_classes;
  const int32_t column_class = border - row_class * conv.plan.column_classes;
  const TapRange rows = taps_inside(row_border(conv), row_class);
  const TapRange columns = taps_inside(column_border(conv), column_class);
  const auto sum = [&](int32_t row, int32_t column) { return tap_sum(conv, row, column, channel); };
  const auto zeros = [&](int32_t taps, int32_t bits) {
    return conv.group_in_channels * taps - 2 * bits;
  };
  const int32_t inside = zeros((rows.end - rows.first) * (columns.end - columns.first),
                               sum(rows.end, columns.end) - sum(rows.first, columns.end) -
                                   sum(rows.end, columns.first) + sum(rows.first, columns.first));
  const int32_t all = zeros(conv.taps, sum(conv.kernel_height, conv.kernel_width));
  return kMagicBits + inside - conv.pad_value * (all - inside);
}

// Without its window. No branches, so that several of these overlap.
__device__ inline Pixel locate_pixel(const HaloConv& conv, const TilePosition& tile, int32_t flat) {
  const HaloPlan& plan = conv.plan;
  const TilePosition in_tile = halo_position(conv, flat);
  const int32_t n = tile.image + in_tile.image, p = tile.row + in_tile.row;
  const int32_t q = tile.column + in_tile.column;
  const bool is_valid = (in_tile.row < plan.tile_rows) & (in_tile.column < plan.tile_columns) &
                        (n < conv.batch) & (p < conv.out_height) & (q < conv.out_width);
  int32_t border = 0;
  if (conv.pad_value != -1) {
    border = border_class(row_border(conv), p) * plan.column_classes +
             border_class(column_border(conv), q);
  }
  return {0.0f, is_valid ? border * plan.block_channels : 0,
          is_valid ? (n * conv.out_height + p) * conv.out_width + q : -1};
}

// The following are work for `threads` threads, of which this one is number `thread`.

// Turns the taps' bit counts into those of all taps up to a tap's row and column.
__device__ inline void sum_tap_counts(const HaloConv& conv, int thread, int threads) {
  const int32_t channels = conv.plan.block_channels;
  for (int32_t channel = thread; channel < channels; channel += threads) {
    int32_t* count = shared<int32_t>(conv.at.tap_counts) + channel;
    for (int32_t i = 0; i < conv.kernel_height; ++i) {
      int32_t row_sum = 0;
      for (int32_t j = 0; j < conv.kernel_width; ++j, count += channels) {
        row_sum += *count;
        *count = row_sum + (i > 0 ? count[-conv.kernel_width * channels] : 0);
      }
    }
  }
}

// threads: a multiple of the block's channels. offset: what is added to the entries of the thread's
// channel, thread % channels.
__device__ inline void make_table(const HaloConv& conv, int thread, int threads, int32_t offset) {
  const int32_t channels = conv.plan.block_channels, channel = thread % channels;
  const int32_t classes = conv.plan.row_classes * conv.plan.column_classes;
  for (int32_t border = thread / channels; border < classes; border += threads / channels) {
    shared<int32_t>(conv.at.table)[border * channels + channel] =
        table_entry(conv, border, channel) + offset;
  }
}

// The bits of each pixel in a stage of the halo, added up over the steps of a tile.
__device__ inline void count_pixels(const HaloConv& conv, int slot, bool is_first_step, int thread,
                                    int threads) {
  constexpr int kBatch = 4;  // At a time, since a thread spends its time waiting.
  const HaloPlan& plan = conv.plan;
  const uint4* halo = shared<uint4>(conv.at.halo + slot * plan.stage_bytes());
  int32_t* counts = shared<int32_t>(conv.at.pixel_counts);
  const int32_t pixels = plan.phases() * plan.region_pixels;
  for (int32_t first = thread; first < pixels; first += kBatch * threads) {
    int32_t sums[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t i = first + b * threads;
      sums[b] = is_first_step || i >= pixels ? 0 : counts[i];
    }
    for (int32_t chunk = 0; chunk < plan.stage_chunks; ++chunk) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int32_t i = first + b * threads;
        const uint4 v = i < pixels ? halo[chunk * pixels + i] : uint4{};
        sums[b] += __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t i = first + b * threads;
      if (i < pixels) counts[i] = sums[b];
    }
  }
}

__device__ inline Pixel* pixels_at(const HaloConv& conv, int slot, int32_t run) {
  return shared<Pixel>(conv.at.pixels) + (slot * conv.plan.runs + run) * kRunPixels;
}

__device__ inline void make_pixels(const HaloConv& conv, const TilePosition& tile, int slot,
                                   int thread, int threads) {
  constexpr int kBatch = 2;  // As in count_pixels.
  const int32_t* pixel_counts = shared<int32_t>(conv.at.pixel_counts);
  const int32_t count = conv.plan.runs * kRunPixels;
  for (int32_t first = thread; first < count; first += kBatch * threads) {
    Pixel pixels[kBatch];
    const int32_t* from[kBatch];
    int32_t bits[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int32_t flat = first + b * threads;
      pixels[b] = locate_pixel(conv, tile, flat);
      from[b] = pixel_counts + (pixels[b].index >= 0 ? flat : 0);
    }
    for (int32_t tap = 0; tap < conv.taps; ++tap) {
      const int32_t shift = conv.tables.shifts[tap];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) bits[b] += from[b][shift];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      pixels[b].window = -2.0f * bits[b] - kMagic;
      const int32_t flat = first + b * threads;
      if (flat < count) pixels_at(conv, slot, 0)[flat] = pixels[b];
    }
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
