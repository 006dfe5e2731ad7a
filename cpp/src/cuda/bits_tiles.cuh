#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>

#include "binconv/bits.h"
#include "cuda/chunk.h"
#include "cuda/divisor.cuh"
#include "cuda/numeric.cuh"

// How bits.cu cuts an image into tiles, one to a thread block. Inside a tile 32 bits hold every
// number; where it lies takes 64.

namespace binconv::cuda {

// The values of a tile: rows of neighbours in memory.
struct TileRows {
  int64_t first;   // Index of the first value.
  int64_t stride;  // From row to row.
  int32_t count;
  int32_t values;  // Of one row.
};

// The size, of `unit` values each, whose thread blocks take the least time: in waves of so many as
// run at once, each with a start and an end that take as long as `fixed` values do (fitted to
// measurements on an H200).
template <class Count>
int32_t tile_size(int32_t largest, int32_t smallest, int64_t unit, int64_t fixed,
                  int multiprocessors, const Count& count_of) {
  constexpr int64_t kBlocks = 8;  // On a multiprocessor.
  int32_t best = largest;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int32_t size = largest; size >= smallest; size /= 2) {
    const int64_t waves = ceil_div<int64_t>(count_of(size), kBlocks * multiprocessors);
    const int64_t time = waves * (fixed + size * unit);
    if (time < least) least = time, best = size;
  }
  return best;
}

// kNHWC: a tile is a number of packed chunks, neighbours in memory. So are their values: one row.
class NhwcTiles {
 public:
  static constexpr int32_t kMaxValues = 16384, kMinValues = 2048, kMaxChunks = 1024;

  struct Tile {
    int64_t first_chunk;
    int32_t chunks;
    uint32_t pixel_chunk;  // Which one of its pixel the first chunk is.
    TileRows rows;
  };

  struct Chunk {
    int32_t first_value;  // In the tile's row.
    int32_t channels;     // Of the pixel, from the chunk's first one on.
  };

  NhwcTiles(const ImageShape& shape, int multiprocessors)
      : channels_(static_cast<uint32_t>(shape.channels)),
        pixel_chunks_(static_cast<uint32_t>(ceil_div<int64_t>(shape.channels, kChunkBits))),
        all_chunks_(shape.batch * shape.height * shape.width * pixel_chunks_.value),
        tile_chunks_(chunks_of(
            tile_size(kMaxValues, kMinValues, 1, 1024, multiprocessors,
                      [&](int32_t values) { return ceil_div(all_chunks_, chunks_of(values)); }))),
        count_(ceil_div(all_chunks_, tile_chunks_)) {}

  __host__ __device__ int64_t count() const { return count_; }
  int64_t max_row_values() const {
    return chunk_at({}, static_cast<int32_t>(tile_chunks_)).first_value;
  }
  // Rows start at multiples of it.
  int64_t row_unit() const { return std::gcd(channels_.value, uint32_t{kChunkBits}); }

  __host__ __device__ Tile at(int64_t index) const {
    const int64_t first = index * tile_chunks_;
    const int64_t pixel = first / pixel_chunks_.value;
    Tile tile = {.first_chunk = first,
                 .chunks = static_cast<int32_t>(min(all_chunks_ - first, tile_chunks_)),
                 .pixel_chunk = static_cast<uint32_t>(first - pixel * pixel_chunks_.value)};
    tile.rows = {.first = pixel * channels_.value + int64_t{tile.pixel_chunk} * kChunkBits,
                 .stride = 0,
                 .count = 1,
                 .values = chunk_at(tile, tile.chunks).first_value};
    return tile;
  }

  __host__ __device__ Chunk chunk_at(const Tile& tile, int32_t index) const {
    const Divisor::Result at = pixel_chunks_.divide(tile.pixel_chunk + index);
    const uint32_t first = at.remainder * kChunkBits;
    const uint32_t skipped = tile.pixel_chunk * kChunkBits;
    return {static_cast<int32_t>(at.quotient * channels_.value + first - skipped),
            static_cast<int32_t>(channels_.value - first)};
  }

  struct Value {
    uint32_t channel;
    uint32_t bit;  // In the tile's chunks.
  };
  __host__ __device__ Value value_at(const Tile& tile, uint32_t value) const {
    const Divisor::Result at = channels_.divide(tile.pixel_chunk * kChunkBits + value);
    return {at.remainder, value + at.quotient * padding()};
  }

  __host__ __device__ uint32_t channels() const { return channels_.value; }
  // Unused bits of a packed pixel.
  __host__ __device__ uint32_t padding() const {
    return pixel_chunks_.value * kChunkBits - channels_.value;
  }

 private:
  // Whole pixels, where one fits.
  int64_t chunks_of(int32_t values) const {
    const uint32_t pixels = values / std::max<uint32_t>(channels_.value, kMaxValues / kMaxChunks);
    return pixels > 0 ? pixels * pixel_chunks_.value : values / kChunkBits;
  }

  Divisor channels_;
  Divisor pixel_chunks_;
  int64_t all_chunks_;
  int64_t tile_chunks_;
  int64_t count_;
};

// kNCHW: a tile is one chunk of neighbouring pixels of one image. Each of its channels is a row.
class NchwTiles {
 public:
  static constexpr int32_t kMaxPixels = 256, kMinPixels = 32;

  struct Tile {
    int64_t first_pixel;  // Of all images.
    int64_t chunk;
    TileRows rows;
  };

  NchwTiles(const ImageShape& shape, int multiprocessors)
      : channels_(shape.channels),
        chunks_(ceil_div<int64_t>(shape.channels, kChunkBits)),
        plane_(shape.height * shape.width),
        tile_pixels_(std::min<int64_t>(
            plane_, tile_size(most_pixels(), kMinPixels, kChunkBits, 8192, multiprocessors,
                              [&](int32_t pixels) {
                                return shape.batch * chunks_ * ceil_div<int64_t>(plane_, pixels);
                              }))),
        plane_tiles_(ceil_div(plane_, tile_pixels_)),
        count_(shape.batch * chunks_ * plane_tiles_) {}

  __host__ __device__ int64_t count() const { return count_; }
  // Of a pixel of the tile, in the packed image.
  __host__ __device__ int64_t chunk_index(const Tile& tile, int32_t pixel) const {
    return (tile.first_pixel + pixel) * chunks_ + tile.chunk;
  }

  __host__ __device__ Tile at(int64_t index) const {
    const int64_t image_chunk = index / plane_tiles_;
    const int64_t pixel = (index - image_chunk * plane_tiles_) * tile_pixels_;
    const int64_t image = image_chunk / chunks_;
    const int64_t chunk = image_chunk - image * chunks_;
    const int64_t channel = chunk * kChunkBits;
    return {.first_pixel = image * plane_ + pixel,
            .chunk = chunk,
            .rows = {.first = (image * channels_ + channel) * plane_ + pixel,
                     .stride = plane_,
                     .count = static_cast<int32_t>(min(channels_ - channel, int64_t{kChunkBits})),
                     .values = static_cast<int32_t>(min(plane_ - pixel, tile_pixels_))}};
  }

  int64_t max_row_values() const { return tile_pixels_; }
  // Rows start at multiples of it.
  int64_t row_unit() const { return std::gcd(plane_, tile_pixels_); }

 private:
  // Larger tiles of many rows keep too few blocks loading: 84% of a copy's bandwidth for 56x56 with
  // 256 channels of float16 instead of 87%.
  int32_t most_pixels() const { return channels_ > kChunkBits / 4 ? kMaxPixels / 2 : kMaxPixels; }

  int64_t channels_;
  int64_t chunks_;  // Of a pixel.
  int64_t plane_;   // Pixels of an image.
  int64_t tile_pixels_;
  int64_t plane_tiles_;
  int64_t count_;
};

}  // namespace binconv::cuda
