#include "check.h"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"

namespace binconv::cuda {
namespace {

// What the kernels need of an ImageShape.
struct Image {
  int64_t pixels;        // Of all images together.
  int64_t plane_pixels;  // height * width
  int32_t channels;
  int32_t chunks;  // 16-byte chunks of a packed pixel.
};

constexpr int kChunkBytes = 16;
constexpr int kChunkWords = 4;

Image image_of(const ImageShape& shape) {
  const int64_t plane_pixels = shape.height * shape.width;
  return {.pixels = shape.batch * plane_pixels,
          .plane_pixels = plane_pixels,
          .channels = static_cast<int32_t>(shape.channels),
          .chunks = static_cast<int32_t>(packed_bytes(shape.channels) / kChunkBytes)};
}

// Whether every vector of kVectorWidth<T> channels of every kNHWC pixel is aligned and within the
// pixel.
template <class T>
bool has_vector_pixels(const ImageShape& shape, const T* x) {
  return is_vector_aligned(x) && shape.channels % kVectorWidth<T> == 0;
}

__device__ uint32_t to_bit(float x, const Threshold& threshold, int32_t channel) {
  return x >= (threshold.per_channel ? threshold.per_channel[channel] : threshold.value);
}

template <class T>
__device__ T to_value(uint32_t bit) {
  return from_float<T>(bit ? 1.0f : -1.0f);
}

constexpr int kThreads = 256;

// kNHWC, packing: a thread makes one piece, the packed bytes of at least 16 bytes of values.
template <class T>
using Piece = std::conditional_t<sizeof(T) == 1, uint16_t, uint8_t>;

template <int kWidth, class T>
__global__ void __launch_bounds__(kThreads)
    pack_nhwc(Image image, const T* x, Threshold threshold, Piece<T>* packed) {
  constexpr int kPieceBits = 8 * sizeof(Piece<T>);
  const int32_t pixel_pieces = image.chunks * (kChunkBytes / sizeof(Piece<T>));
  for (int64_t i = grid_index(); i < image.pixels * pixel_pieces; i += grid_step()) {
    const int64_t pixel = i / pixel_pieces;
    const int32_t first = static_cast<int32_t>(i - pixel * pixel_pieces) * kPieceBits;
    const T* values = x + pixel * image.channels;
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < kPieceBits; k += kWidth) {
      const int32_t channel = first + k;
      if (channel >= image.channels) continue;
      const Vector<T, kWidth> vector = load_vector<kWidth>(values + channel);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        bits |= to_bit(to_float(vector.values[j]), threshold, channel + j) << (k + j);
      }
    }
    packed[i] = static_cast<Piece<T>>(bits);
  }
}

// kNHWC, unpacking: a thread makes one vector of values.
template <int kWidth, class T>
__global__ void __launch_bounds__(kThreads) unpack_nhwc(Image image, const uint8_t* packed, T* x) {
  const int32_t pixel_vectors = image.channels / kWidth;
  for (int64_t i = grid_index(); i < image.pixels * pixel_vectors; i += grid_step()) {
    const int64_t pixel = i / pixel_vectors;
    const int32_t channel = static_cast<int32_t>(i - pixel * pixel_vectors) * kWidth;
    const uint8_t* bytes = packed + pixel * image.chunks * kChunkBytes;
    Vector<T, kWidth> vector;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      vector.values[j] = to_value<T>(bytes[(channel + j) / 8] >> ((channel + j) % 8) & 1);
    }
    store_vector(x + i * kWidth, vector);
  }
}

// kNCHW: a block works on tiles of one chunk of 32 pixels. Lanes run along the pixels, which are
// neighbours in a plane of values, and each of the four warps has one word of the chunk.
constexpr int kTilePixels = kWarpSize;
constexpr int kTileThreads = kTilePixels * kChunkWords;
constexpr int kWordBits = 32;

__host__ __device__ int64_t tiles_of(const Image& image) {
  return ceil_div<int64_t>(image.pixels, kTilePixels) * image.chunks;
}

struct Tile {
  int64_t first_pixel;
  int32_t chunk;
};

__device__ Tile tile_at(const Image& image, int64_t index) {
  const int64_t pixels = index / image.chunks;
  return {pixels * kTilePixels, static_cast<int32_t>(index - pixels * image.chunks)};
}

// Word `word` of a pixel's chunk, in a packed image of 32-bit words.
__device__ int64_t word_index(const Image& image, int64_t pixel, int32_t chunk, int word) {
  return (pixel * image.chunks + chunk) * kChunkWords + word;
}

// The values of one pixel in up to 32 channels, one to a plane.
struct Column {
  int64_t index;    // Of the first value.
  int32_t channel;  // Of the first value.
  int32_t count;    // 0 beyond the last pixel or channel.
};

__device__ Column column_at(const Image& image, int64_t pixel, int32_t chunk, int word) {
  const int32_t channel = (chunk * kChunkWords + word) * kWordBits;
  if (pixel >= image.pixels || channel >= image.channels) return {};
  const int64_t batch = pixel / image.plane_pixels;
  const int64_t in_plane = pixel - batch * image.plane_pixels;
  return {(batch * image.channels + channel) * image.plane_pixels + in_plane, channel,
          min(image.channels - channel, kWordBits)};
}

template <class T>
__device__ uint32_t pack_column(const Image& image, const Column& column, const T* x,
                                const Threshold& threshold) {
  const T* values = x + column.index;
  const auto bit = [&](int k) {
    return to_bit(to_float(values[k * image.plane_pixels]), threshold, column.channel + k) << k;
  };
  uint32_t bits = 0;
  if (column.count == kWordBits) {  // Unrolled, so that all loads are in flight at once.
#pragma unroll
    for (int k = 0; k < kWordBits; ++k) bits |= bit(k);
  } else {
    for (int k = 0; k < column.count; ++k) bits |= bit(k);
  }
  return bits;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    pack_nchw(Image image, const T* x, Threshold threshold, uint32_t* packed) {
  // Words are made along pixels and stored along chunks: four threads store the 16 bytes of a
  // pixel.
  __shared__ uint32_t words[kTilePixels][kChunkWords];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int row = threadIdx.x / kChunkWords, word = threadIdx.x % kChunkWords;
  const int64_t tiles = tiles_of(image);
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(image, i);
    const Column column = column_at(image, tile.first_pixel + lane, tile.chunk, warp);
    words[lane][warp] = pack_column(image, column, x, threshold);
    __syncthreads();
    const int64_t pixel = tile.first_pixel + row;
    if (pixel < image.pixels) packed[word_index(image, pixel, tile.chunk, word)] = words[row][word];
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    unpack_nchw(Image image, const uint32_t* packed, T* x) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t tiles = tiles_of(image);
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(image, i);
    const int64_t pixel = tile.first_pixel + lane;
    const Column column = column_at(image, pixel, tile.chunk, warp);
    if (column.count == 0) continue;
    const uint32_t bits = packed[word_index(image, pixel, tile.chunk, warp)];
    for (int k = 0; k < column.count; ++k) {
      x[column.index + k * image.plane_pixels] = to_value<T>(bits >> k & 1);
    }
  }
}

}  // namespace

void pack_bits(const ImageShape& shape, const void* x, DataType type, Layout layout,
               const Threshold& threshold, uint8_t* packed, const Queue& queue) {
  const Image image = image_of(shape);
  dispatch_value_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* values = static_cast<const T*>(x);
    if (layout == Layout::kNCHW) {
      return launch("pack_bits", queue, tiles_of(image), kTileThreads, pack_nchw<T>, image, values,
                    threshold, reinterpret_cast<uint32_t*>(packed));
    }
    const int64_t pieces = image.pixels * image.chunks * (kChunkBytes / sizeof(Piece<T>));
    dispatch_bool(has_vector_pixels(shape, values), [&](auto vectors) {
      constexpr int kWidth = vectors ? kVectorWidth<T> : 1;
      launch("pack_bits", queue, ceil_div<int64_t>(pieces, kThreads), kThreads,
             pack_nhwc<kWidth, T>, image, values, threshold, reinterpret_cast<Piece<T>*>(packed));
    });
  });
}

void unpack_bits(const ImageShape& shape, const uint8_t* packed, void* x, DataType type,
                 Layout layout, const Queue& queue) {
  const Image image = image_of(shape);
  dispatch_value_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* values = static_cast<T*>(x);
    if (layout == Layout::kNCHW) {
      return launch("unpack_bits", queue, tiles_of(image), kTileThreads, unpack_nchw<T>, image,
                    reinterpret_cast<const uint32_t*>(packed), values);
    }
    dispatch_bool(has_vector_pixels(shape, values), [&](auto vectors) {
      constexpr int kWidth = vectors ? kVectorWidth<T> : 1;
      launch("unpack_bits", queue,
             ceil_div<int64_t>(image.pixels * (image.channels / kWidth), kThreads), kThreads,
             unpack_nhwc<kWidth, T>, image, packed, values);
    });
  });
}

}  // namespace binconv::cuda
