#include "check.h"
#include "cuda/cuda.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/prepared_weight.h"
#include "cuda/tap_bits.cuh"

// Popcount convolution on plain cores, for any shape and any GPU. The lanes of a warp are 32
// consecutive output channels, so that weights load coalesced and activations broadcast, and each
// thread keeps kPixels consecutive output pixels, which share the loaded weights.

namespace binconv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPixels = 8;
constexpr int kBlockPixels = kThreads / kWarpSize * kPixels;

// What the kernel needs of a Conv2dShape. Extents are below 2^31.
struct Conv {
  const uint8_t* input;
  const uint4* weights;
  TapBits tap_bits;
  PreparedLayout prepared;
  int64_t pixel_bytes;
  uint32_t in_height, in_width;
  int64_t out_width;
  uint32_t kernel_height, kernel_width;
  uint32_t stride_height, stride_width;
  uint32_t pad_top, pad_left;
  uint32_t dilation_height, dilation_width;
  int32_t pad_value;
  int32_t group_in_channels;
  int32_t group_out_channels;
};

// The top left tap of an output pixel. Coordinates count modulo 2^32: all that lie above or left of
// the image come out as 2^31 or more, that is as outside.
struct Window {
  int64_t first_row;  // Of its image, in the rows of all images.
  uint32_t row, column;
};

__device__ Window window_at(const Conv& conv, const Output& output, int64_t pixel) {
  const int64_t batch = pixel / output.plane_pixels;
  const int64_t in_plane = pixel - batch * output.plane_pixels;
  const uint32_t row = in_plane / conv.out_width, column = in_plane % conv.out_width;
  return {batch * conv.in_height, row * conv.stride_height - conv.pad_top,
          column * conv.stride_width - conv.pad_left};
}

constexpr int64_t kOutside = -1;

// Of the input pixel under a tap, in bytes.
__device__ int64_t tap_offset(const Conv& conv, const Window& window, uint32_t i, uint32_t j) {
  const uint32_t row = window.row + i * conv.dilation_height;
  const uint32_t column = window.column + j * conv.dilation_width;
  if (row >= conv.in_height || column >= conv.in_width) return kOutside;
  return ((window.first_row + row) * conv.in_width + column) * conv.pixel_bytes;
}

// Loads of a group's words from a packed pixel, at word `word` with `bits` bits of the group to go.
// Where a group is the whole pixel or starts and ends at a chunk, chunks load at once.
struct ChunkLoad {
  static constexpr int kWords = 4;
  static __device__ void load(const uint8_t* group, int word, int, uint32_t (&words)[kWords]) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(group + word * sizeof(uint32_t));
    words[0] = chunk.x, words[1] = chunk.y, words[2] = chunk.z, words[3] = chunk.w;
  }
  static __device__ void load_weight(const uint4* chunk, int, uint32_t (&words)[kWords]) {
    const uint4 bits = *chunk;
    words[0] = bits.x, words[1] = bits.y, words[2] = bits.z, words[3] = bits.w;
  }
};

// Where it can start and end at any byte, it loads from the one or two aligned words that hold its
// bits: these lie within the pixel, which is a multiple of 16 bytes.
struct ByteLoad {
  static constexpr int kWords = 1;
  static __device__ void load(const uint8_t* group, int word, int bits, uint32_t (&words)[kWords]) {
    const uint8_t* from = group + word * sizeof(uint32_t);
    const int skipped = reinterpret_cast<uintptr_t>(from) % sizeof(uint32_t);
    const uint32_t* aligned = reinterpret_cast<const uint32_t*>(from - skipped);
    const int taken = min(bits, kWordBits);
    const uint32_t low = aligned[0];
    const uint32_t high = 8 * skipped + taken > kWordBits ? aligned[1] : 0;
    words[0] = __funnelshift_r(low, high, 8 * skipped) & (~0u >> (kWordBits - taken));
  }
  static __device__ void load_weight(const uint4* chunk, int word, uint32_t (&words)[kWords]) {
    words[0] = reinterpret_cast<const uint32_t*>(chunk)[word % kChunkWords];
  }
};

// Counts two down for every bit of a tap that differs: an equal bit is worth 1, a differing one -1,
// and acc starts from all bits. Null groups are outside the image.
template <class Load>
__device__ void subtract_differences(const Conv& conv, const uint8_t* const (&groups)[kPixels],
                                     const uint4* weights, int32_t (&acc)[kPixels]) {
  const int64_t chunk_step = conv.prepared.taps * kCoreRows;
  const int words = ceil_div(conv.group_in_channels, kWordBits);
#pragma unroll 1
  for (int word = 0; word < words; word += Load::kWords) {
    uint32_t activations[kPixels][Load::kWords] = {};
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      if (!groups[p]) continue;
      Load::load(groups[p], word, conv.group_in_channels - word * kWordBits, activations[p]);
    }
    uint32_t weight[Load::kWords];
    Load::load_weight(weights + word / kChunkWords * chunk_step, word, weight);
#pragma unroll
    for (int k = 0; k < Load::kWords; ++k) {
#pragma unroll
      for (int p = 0; p < kPixels; ++p) acc[p] -= 2 * __popc(activations[p][k] ^ weight[k]);
    }
  }
}

// Lane p of the warp knows the window of pixel p.
template <class Load>
__device__ void convolve(const Conv& conv, const Window& lane_window, int64_t channel,
                         int64_t group, int32_t (&acc)[kPixels]) {
  const uint8_t* input = conv.input + group * (conv.group_in_channels / 8);
  const uint4* weights = conv.weights + conv.prepared.chunk_index(channel, 0, 0);
  for (int32_t& value : acc) value = conv.prepared.taps * conv.group_in_channels;
  for (uint32_t i = 0; i < conv.kernel_height; ++i) {
    for (uint32_t j = 0; j < conv.kernel_width; ++j) {
      const int64_t lane_offset = tap_offset(conv, lane_window, i, j);
      const bool has_padding =
          conv.pad_value != -1 && __ballot_sync(kWholeWarp, lane_offset == kOutside) != 0;
      const uint8_t* groups[kPixels];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        const int64_t offset = __shfl_sync(kWholeWarp, lane_offset, p);
        groups[p] = offset == kOutside ? nullptr : input + offset;
      }
      subtract_differences<Load>(conv, groups, weights, acc);
      if (has_padding) {
        // Outside, where zeros were read, this makes it pad_value (docs/conventions.md).
        const int32_t row = static_cast<int32_t>(i), column = static_cast<int32_t>(j);
        const int32_t bits = conv.tap_bits.count({row, row + 1}, {column, column + 1}, channel);
        const int32_t padding = (conv.pad_value + 1) * (2 * bits - conv.group_in_channels);
#pragma unroll
        for (int p = 0; p < kPixels; ++p) acc[p] += groups[p] ? 0 : padding;
      }
      weights += kCoreRows;
    }
  }
}

template <class Load>
__global__ void __launch_bounds__(kThreads) conv2d_kernel(Conv conv, Output output) {
  await_previous_kernel();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t channel_blocks = ceil_div<int64_t>(output.channels, kWarpSize);
  const int64_t blocks = ceil_div<int64_t>(output.pixels, kBlockPixels) * channel_blocks;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t pixel_block = block / channel_blocks;
    const int64_t first = pixel_block * kBlockPixels + warp * kPixels;
    if (first >= output.pixels) continue;
    const int64_t channel = (block - pixel_block * channel_blocks) * kWarpSize + lane;
    const int64_t valid_channel = min(channel, output.channels - 1);
    const Window window = window_at(conv, output, min(first + lane % kPixels, output.pixels - 1));
    int32_t acc[kPixels];
    convolve<Load>(conv, window, channel, valid_channel / conv.group_out_channels, acc);
    // The loop is not unrolled, to keep the code small: the accumulators shift instead.
    const ChannelTerms terms = load_channel_terms(output.epilogue, valid_channel);
    const int64_t end = min(first + kPixels, output.pixels);
#pragma unroll 1
    for (int64_t pixel = first; pixel < end; ++pixel) {
      store_result(output, pixel, channel, terms, acc[0]);
#pragma unroll
      for (int p = 1; p < kPixels; ++p) acc[p - 1] = acc[p];
    }
  }
}

bool runs_on(const Target& target) { return target.is_cuda && target.compute_capability >= 75; }

Conv conv_of(const Conv2dArgs& args) {
  const Conv2dShape& shape = args.shape;
  const WeightShape& weight = shape.weight;
  const PreparedLayout layout = prepared_layout(weight);
  const auto narrow = [](int64_t extent) { return static_cast<uint32_t>(extent); };
  return {.input = args.input,
          .weights = reinterpret_cast<const uint4*>(args.prepared_weight),
          .tap_bits = {reinterpret_cast<const int32_t*>(args.prepared_weight + layout.bit_bytes()),
                       layout.channels, static_cast<int32_t>(weight.kernel_width)},
          .prepared = layout,
          .pixel_bytes = packed_bytes(weight.in_channels),
          .in_height = narrow(shape.in_height),
          .in_width = narrow(shape.in_width),
          .out_width = shape.out_width(),
          .kernel_height = narrow(weight.kernel_height),
          .kernel_width = narrow(weight.kernel_width),
          .stride_height = narrow(shape.stride_height),
          .stride_width = narrow(shape.stride_width),
          .pad_top = narrow(shape.pad_top),
          .pad_left = narrow(shape.pad_left),
          .dilation_height = narrow(shape.dilation_height),
          .dilation_width = narrow(shape.dilation_width),
          .pad_value = shape.pad_value,
          .group_in_channels = static_cast<int32_t>(weight.in_channels / weight.groups),
          .group_out_channels = static_cast<int32_t>(weight.out_channels / weight.groups)};
}

Output output_of(const Conv2dArgs& args) {
  const int64_t plane_pixels = args.shape.out_height() * args.shape.out_width();
  const int64_t channels = args.shape.weight.out_channels;
  void* const bits = args.epilogue.out_type == DataType::kBits ? args.output : args.epilogue.bits;
  return {.epilogue = args.epilogue,
          .data = args.output,
          .bits = static_cast<uint32_t*>(bits),
          .pixels = args.shape.batch * plane_pixels,
          .plane_pixels = plane_pixels,
          .channels = channels,
          .packed_words = packed_bytes(channels) / static_cast<int64_t>(sizeof(uint32_t))};
}

void launch_conv2d(const Conv2dArgs& args, const Queue& queue) {
  const Conv conv = conv_of(args);
  const Output output = output_of(args);
  const int64_t blocks = ceil_div<int64_t>(output.pixels, kBlockPixels) *
                         ceil_div<int64_t>(output.channels, kWarpSize);
  const bool has_chunks = args.shape.weight.groups == 1 || conv.group_in_channels % 128 == 0;
  launch("binary_conv2d", queue, blocks, kThreads,
         has_chunks ? conv2d_kernel<ChunkLoad> : conv2d_kernel<ByteLoad>, conv, output);
}

}  // namespace

const Kernel kConv2dDirect = {.name = "cuda_direct",
                              .runs_on = runs_on,
                              .accepts = accepts_any_shape,
                              .prepared_bytes = prepared_bytes,
                              .prepare = prepare_weight,
                              .prepare_values = prepare_values,
                              .workspace_bytes = no_workspace,
                              .launch = launch_conv2d};

}  // namespace binconv::cuda
