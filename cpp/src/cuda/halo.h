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
constexpr int kMostChannels = 128;  // Of a thread block.

// What a kernel brings to a plan.
struct HaloLimits {
  int multiprocessors;
  int shared_bytes;  // That one thread block can have.
  // Runs that a block multiplies at once: with 128 channels, with fewer, with streamed weights.
  int wide_runs, narrow_runs, streamed_runs;
  int least_channels;  // Of a thread block: 32 or 64.
  int ones;            // Columns of ones behind the weights of a block, in which the bits of the
                       // pixels are counted. A multiple of 8.
  bool lists_pixels;   // Where weights are resident, of each halo stage.
  bool keeps_step;  // All of a block ends with one tile before it multiplies the next, and all of
                    // it loads: where weights are streamed, by a list of the halo's sources.
  int most_halo_stages, most_streamed_parts;  // Buffers; at least kLeastStages.

  bool operator==(const HaloLimits&) const = default;
};

constexpr int kLeastStages = 2;

// What the kernels bring, on the least of the GPUs that they run on.
extern const HaloLimits kSm90Limits, kSm80Limits;

struct AxisShape {
  int64_t in, out, kernel, stride, pad, dilation;
};

// Where padding shows in the output: the rows (or columns) at both ends that lose taps to it. Each
// of these has an entry of its own in tables, all between them one.
struct Border {
  int32_t entries, before, positions;  // Entries, those at the start; positions of the output.

  constexpr int32_t entry(int32_t position) const {
    const int32_t from_end = position + entries - positions;
    const int32_t between = from_end > before ? from_end : before;
    return position < between ? position : between;
  }
  constexpr int32_t position(int32_t entry) const {  // The first one that has the entry.
    return entry <= before ? entry : entry + positions - entries;
  }
};
Border border_of(const AxisShape& axis);

struct HaloPlan {
  int32_t block_channels;  // Output channels of a thread block: 32, 64 or 128.
  int32_t columns;         // Of its multiplications: these channels, and the ones behind them.
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
  int32_t halo_stages;
  bool lists_pixels;   // Each halo stage has a list of where the tile's output pixels belong.
  bool lists_sources;  // The block has a list of where the tile's halo comes from.
  int32_t pairs;       // Of chunks, that the multiplications of a stage take.
  // The block's weights lie in shared memory in parts: the stages of streamed weights, or all.
  int32_t parts;
  int32_t part_chunks, part_taps;  // Of one part.
  Border row_border, column_border;

  constexpr int runs_at_once(const HaloLimits& limits) const {
    if (is_streamed) return limits.streamed_runs;
    return block_channels == kMostChannels ? limits.wide_runs : limits.narrow_runs;
  }
  constexpr int32_t phases() const { return phases_height * phases_width; }
  constexpr int32_t halo_pixels() const { return halo_rows * tile_images * pitch; }
  constexpr int32_t stage_bytes() const { return stage_chunks * phases() * region_pixels * 16; }
  constexpr int32_t part_atoms() const { return part_chunks * part_taps; }
  constexpr int32_t part_bytes() const { return columns * part_atoms() * 16; }
};

// What one multiplication takes: two 16-byte chunks of 64 pixels and of the block's weights. In
// units of 16 bytes, from the start of a halo stage and of the weights: the first chunk in the low
// half of a word, how much further the second lies in the high half.
//
// A part of the weights is [column / 8][chunk][tap][8][16 bytes], as in prepared_weight.h. One of
// resident weights has two chunks of all taps; where the number of chunks is odd, also a tap of
// zeros. One of streamed weights has two chunks of kStreamTaps taps.
struct HaloPair {
  uint32_t halo, weights;
};

constexpr int kMaxPairs = 128;

// The taps inside the input: rows from first_row to end_row - 1, columns likewise.
struct InsideTaps {
  uint8_t first_row, end_row, first_column, end_column;
};

constexpr int kMaxBorderEntries = 128;  // Of rows times those of columns.

struct HaloTables {
  HaloPair pairs[kMaxPairs];             // Of a stage.
  InsideTaps inside[kMaxBorderEntries];  // Of each entry of the border, row by row.
};

// How many pixels a tap's pixels lie behind those of the first tap.
int64_t tap_shift(const Conv2dShape& shape, const HaloPlan& plan, int64_t tap);

HaloTables halo_tables(const Conv2dShape& shape, const HaloPlan& plan);

constexpr int kStreamTaps = 4;

// A pixel of a tile, as the epilogue needs it.
struct Pixel {
  int32_t table;  // Where its entries in T start.
  int32_t index;  // In the output, in pixels; negative if it is none.
};

constexpr int kBarrierBytes = 256;
constexpr int kFlagBytes = 64;  // Words of bits for the block's channels.

// Where everything is in shared memory, in bytes.
struct HaloLayout {
  int32_t halo, weights, table, terms, pixels, sources, barriers, total;
};

// What the epilogue knows of each of the block's channels.
enum ChannelTerm {
  kScale,
  kBias,
  kThreshold,
  kThresholdSign,
  kInShift,
  kSlope,
  kOutShift,
  kBitLimit,
  kChannelTerms
};

HaloLayout halo_layout(const HaloPlan& plan);

// Whether a kernel built on this takes a shape at all; cheap.
bool halo_accepts(const Conv2dShape& shape, const HaloLimits& limits);

// The plan of the least estimated time; the shape is one that halo_accepts with no more memory.
HaloPlan plan_halo(const Conv2dShape& shape, const HaloLimits& limits);

}  // namespace binconv::cuda
