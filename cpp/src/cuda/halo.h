#pragma once

#include <cstdint>

#include "kernel_table.h"

// How the tensor-core kernels cut a convolution up, decided on the host from sizes alone.
//
// A tile of output pixels needs a halo of input pixels. It is loaded once into shared memory as
//
//   [chunk of 16 bytes][phase][halo row][image][column]
//
// and no im2col is made of it: to the tensor core, 8 pixels that follow one another there are the
// rows of a core matrix, and a tap is nothing but another start address. The columns of a halo row
// are `pitch` apart for every row and image of a tile, so that one multiplication takes any 64
// pixels in a row, whatever rows and images they belong to ("a run"). Output columns beyond the
// image are computed and dropped; where the padding to the right of one row can serve as the
// padding to the left of the next, the pitch is smaller than a halo row.
//
// A phase is one of the stride_height * stride_width sub-images that a strided convolution reads:
// within a phase, neighbours in the output are neighbours in shared memory.

namespace binconv::cuda {

constexpr int kRunPixels = 64;

// What a kernel brings to a plan.
struct HaloLimits {
  int multiprocessors;
  int shared_bytes;    // That one thread block can have.
  int streamed_runs;   // That a thread block multiplies at once where weights are streamed.
  int least_channels;  // Of a thread block: 32 or 64.
};

struct HaloPlan {
  int32_t block_channels;  // Output channels of a thread block: 32, 64 or 128.
  // Whether weights and channels pass through shared memory two chunks at a time. If not, all
  // weights of the block stay there. Streaming blocks have 128 channels.
  bool is_streamed;
  int32_t tile_rows, tile_columns, tile_images;  // Of the output.
  int32_t row_tiles, column_tiles;
  int32_t tiles;
  int32_t runs;  // Of a tile.
  int32_t phases_height, phases_width;
  int32_t halo_rows, pitch;
  int32_t region_pixels;  // Of one chunk and phase, a multiple of 8; behind the halo some zeros.
  int32_t stage_chunks;   // Chunks of the input channels in shared memory at a time.
  int32_t pairs;          // Of chunks, that the multiplications of a stage take.
  int32_t row_classes, column_classes;  // Border classes, below.
  int32_t rows_lost_before, columns_lost_before;

  constexpr int32_t phases() const { return phases_height * phases_width; }
  constexpr int32_t halo_pixels() const { return halo_rows * tile_images * pitch; }
  constexpr int32_t stage_bytes() const { return stage_chunks * phases() * region_pixels * 16; }
};

// What one multiplication takes: two 16-byte chunks of 64 pixels and of the block's weights. In
// units of 16 bytes, from the start of a halo stage and of the weights: the first chunk in the low
// half of a word, how much further the second lies in the high half.
struct HaloPair {
  uint32_t halo, weights;
};

constexpr int kMaxPairs = 128;
constexpr int kMaxTaps = 128;

struct HaloTables {
  HaloPair pairs[kMaxPairs];  // Of a stage.
  int32_t shifts[kMaxTaps];   // How many pixels a tap's pixels lie behind those of the first tap.
};

HaloTables halo_tables(const Conv2dShape& shape, const HaloPlan& plan);

constexpr int kHaloStages = 2;
// A stage of streamed weights: of two chunks one after the other, this many taps each.
constexpr int kStreamPairs = 4;
constexpr int kStreamStages = 3;

// Where everything is in shared memory, in bytes.
struct HaloLayout {
  int32_t halo, weights, staging, table, scaling, limits, bit_limits, activation, tap_counts,
      pixel_counts, pixels, barriers, total;
};

HaloLayout halo_layout(const HaloPlan& plan, const WeightShape& weight);

// Whether a kernel built on this, whose blocks can have that much shared memory, takes a shape at
// all; cheap.
bool halo_accepts(const Conv2dShape& shape, int64_t shared_bytes);

// The plan of the least estimated time; the shape is one that halo_accepts with no more memory.
HaloPlan plan_halo(const Conv2dShape& shape, const HaloLimits& limits);

// Border classes: output rows (or columns) that lose the same taps to the padding. Class 0 loses
// none; classes 1 .. lost_before lose that many of the first taps, the classes after those lose
// 1, 2, .. of the last taps.
struct BorderClasses {
  int32_t lost_before;  // The most taps that any position loses at the start.
  int32_t lost_after;   // And at the end.
  bool is_separable;    // No position loses taps at both ends.
};

struct AxisShape {
  int64_t in, out, kernel, stride, pad, dilation;
};
BorderClasses border_classes(const AxisShape& axis);

}  // namespace binconv::cuda
