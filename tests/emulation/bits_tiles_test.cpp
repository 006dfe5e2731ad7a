#include "cuda/bits_tiles.cuh"

#include <vector>

#include "random.h"
#include "test.h"

// White-box: the tiles of pack_bits and unpack_bits, also of images that no test could allocate.

namespace binconv::test {
namespace {

using namespace cuda;

constexpr int kManyProcessors = 132, kOneProcessor = 1;

// More than 2^31 pixels, values in a plane, channels in all, or chunks.
const std::vector<ImageShape> kLargeImages = {{3, 64, 1 << 16, 1 << 16}, {1, 3, 1 << 20, 1 << 20},
                                              {1 << 20, 129, 333, 77},   {1 << 30, 1, 7, 7},
                                              {5, 2147483647, 1, 3},     {2147483647, 1000, 1, 1},
                                              {7, 20001, 12347, 54321}};

ImageShape random_image(Random& random) {
  const int64_t channels =
      random.one_in(4) ? random.between(1, 100'000)
                       : random.pick<int64_t>({1, 3, 8, 64, 127, 128, 129, 1000, 16384, 16385});
  const int64_t largest = random.pick<int64_t>({8, 300, 20'000});
  return {random.between(1, largest), channels, random.between(1, largest),
          random.between(1, largest)};
}

std::vector<ImageShape> images() {
  std::vector<ImageShape> all = kLargeImages;
  Random random(1);
  for (int i = 0; i < 300; ++i) all.push_back(random_image(random));
  return all;
}

// The first tiles, the last ones, and some between.
std::vector<int64_t> some_tiles(int64_t count) {
  Random random(count);
  std::vector<int64_t> all;
  for (int64_t i = 0; i < 8; ++i) {
    all.push_back(i % count);
    all.push_back(count - 1 - i % count);
    all.push_back(random.between(0, count - 1));
  }
  return all;
}

int64_t chunks_of(const ImageShape& shape) { return packed_bytes(shape.channels) / 16; }
int64_t pixels_of(const ImageShape& shape) { return shape.batch * shape.height * shape.width; }

// Where the values of a chunk begin in a kNHWC image; of the one behind the last, where they end.
int64_t first_value(const ImageShape& shape, int64_t chunk) {
  const int64_t pixel = chunk / chunks_of(shape), in_pixel = chunk % chunks_of(shape);
  return pixel * shape.channels + in_pixel * kChunkBits;
}

void check_nhwc(const ImageShape& shape, const NhwcTiles& tiles, int64_t index) {
  const NhwcTiles::Tile tile = tiles.at(index);
  const int64_t end = index + 1 < tiles.count() ? tiles.at(index + 1).first_chunk
                                                : pixels_of(shape) * chunks_of(shape);
  CHECK_EQ(tile.first_chunk + tile.chunks, end);
  CHECK(tile.chunks > 0);
  CHECK(tile.chunks <= NhwcTiles::kMaxChunks);
  CHECK_EQ(tile.rows.first, first_value(shape, tile.first_chunk));
  CHECK_EQ(tile.rows.first + tile.rows.values, first_value(shape, end));
  CHECK(tile.rows.values <= tiles.max_row_values());
  CHECK(tiles.max_row_values() <= NhwcTiles::kMaxValues);
  CHECK_EQ(tile.rows.first % tiles.row_unit(), int64_t{0});
  for (int32_t k = 0; k < tile.chunks; ++k) {
    const NhwcTiles::Chunk at = tiles.chunk_at(tile, k);
    const int64_t chunk = tile.first_chunk + k;
    CHECK_EQ(tile.rows.first + at.first_value, first_value(shape, chunk));
    CHECK_EQ(at.channels, shape.channels - chunk % chunks_of(shape) * kChunkBits);
  }
  for (int32_t v = 0; v < tile.rows.values; v += 1 + v % 7) {
    const NhwcTiles::Value at = tiles.value_at(tile, v);
    const int64_t value = tile.rows.first + v;
    CHECK_EQ(int64_t{at.channel}, value % shape.channels);
    CHECK_EQ(tile.first_chunk * kChunkBits + at.bit,
             value / shape.channels * chunks_of(shape) * kChunkBits + at.channel);
  }
}

void check_nchw(const ImageShape& shape, const NchwTiles& tiles, int64_t index) {
  const int64_t plane = shape.height * shape.width;
  const NchwTiles::Tile tile = tiles.at(index);
  const TileRows& rows = tile.rows;
  const int64_t image = tile.first_pixel / plane, pixel = tile.first_pixel % plane;
  CHECK(tile.chunk < chunks_of(shape));
  CHECK_EQ(rows.first, (image * shape.channels + tile.chunk * kChunkBits) * plane + pixel);
  CHECK_EQ(rows.stride, plane);
  CHECK_EQ(int64_t{rows.count},
           std::min<int64_t>(shape.channels - tile.chunk * kChunkBits, kChunkBits));
  CHECK(rows.values > 0);
  CHECK(rows.values <= tiles.max_row_values());
  CHECK(tiles.max_row_values() <= NchwTiles::kMaxPixels);
  CHECK_EQ(rows.first % tiles.row_unit(), int64_t{0});
  CHECK_EQ(rows.stride % tiles.row_unit(), int64_t{0});
  CHECK_EQ(tiles.chunk_index(tile, 5), (tile.first_pixel + 5) * chunks_of(shape) + tile.chunk);
  // The next tile goes on in the plane, with the next chunk or with the next image.
  const bool ends_plane = pixel + rows.values == plane;
  const bool ends_image = ends_plane && tile.chunk + 1 == chunks_of(shape);
  const int64_t first_pixel = ends_image   ? (image + 1) * plane
                              : ends_plane ? image * plane
                                           : tile.first_pixel + rows.values;
  if (index + 1 == tiles.count()) return CHECK_EQ(first_pixel, pixels_of(shape));
  CHECK_EQ(tiles.at(index + 1).first_pixel, first_pixel);
  CHECK_EQ(tiles.at(index + 1).chunk, (tile.chunk + ends_plane) % chunks_of(shape));
}

}  // namespace

TEST(Divisor, DividesEveryDividend) {
  Random random(1);
  for (int i = 0; i < 200'000; ++i) {
    const auto draw = [&] {
      return static_cast<uint32_t>(random.bits() >> random.between(32, 63));
    };
    const uint32_t value = std::max<uint32_t>(draw(), 1);
    const uint32_t multiple = static_cast<uint32_t>(random.bits()) / value * value;
    for (uint32_t dividend : {draw(), multiple, multiple - 1, 0u, ~0u}) {
      const Divisor::Result got = Divisor(value).divide(dividend);
      CHECK_EQ(got.quotient, dividend / value);
      CHECK_EQ(got.remainder, dividend % value);
    }
  }
}

TEST(BitsTiles, CoverImagesOfAnySize) {
  for (const ImageShape& shape : images()) {
    const Context context("image of batch " + std::to_string(shape.batch) + ", channels " +
                          std::to_string(shape.channels) + ", " + std::to_string(shape.height) +
                          "x" + std::to_string(shape.width));
    for (int processors : {kManyProcessors, kOneProcessor}) {
      const NhwcTiles nhwc(shape, processors);
      CHECK_EQ(nhwc.at(0).first_chunk, 0);
      for (int64_t index : some_tiles(nhwc.count())) check_nhwc(shape, nhwc, index);
      const NchwTiles nchw(shape, processors);
      CHECK_EQ(nchw.at(0).first_pixel, 0);
      for (int64_t index : some_tiles(nchw.count())) check_nchw(shape, nchw, index);
    }
  }
}

}  // namespace binconv::test
