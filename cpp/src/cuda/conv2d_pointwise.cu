#include <cute/arch/copy_sm75.hpp>

#include "check.h"
#include "cuda/comparison.cuh"
#include "cuda/conv2d_pointwise.h"
#include "cuda/cuda.h"
#include "cuda/divisor.cuh"
#include "cuda/halo.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma_b1.cuh"
#include "cuda/piece.cuh"
#include "cuda/prepared_weight.h"
#include "cuda/tile_epilogue.cuh"

// 1x1 convolutions of values in one kernel: a block makes the bits of some pixels in shared memory,
// and its warps multiply them, 16 pixels and 32 channels at a time, with weights straight from the
// L1. It reads only the pixels that a stride does not skip, and there is no second kernel to start.

namespace binconv::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocks = 2;  // On a multiprocessor.
constexpr int kColumnBlocks = kGroup / 8;
constexpr int kMostPixels = kWarps * kWarpPixels;  // Of a tile.
constexpr int kMostBytes = 40 * 1024;              // Of its bits.
constexpr int64_t kMostInChannels = 4096, kMostOutChannels = 512;
// Pixels that can be numbered in 32 bits, those of tiles behind the last one included.
constexpr int64_t kReach = int64_t{1} << 30;
// With more, pack_bits and another kernel are faster, which keep more loads and stores in flight.
constexpr int64_t kMostValues = int64_t{1} << 23;

struct PointwiseConv {
  TileConv tile;
  const void* x;
  Threshold threshold;
  int32_t in_channels, pixels;
  int32_t tile_pixels;   // A multiple of 16.
  int32_t pitch;         // From pixel to pixel in shared memory, in chunks: an odd number.
  int32_t bits_at;       // In shared memory.
  Divisor pixel_pieces;  // Of x.
  Divisor out_width, out_height;
};

// The pixel of the input that one of the output has.
__device__ int64_t source_pixel(const PointwiseConv& args, int32_t pixel) {
  const HaloConv& conv = args.tile.conv;
  if (conv.stride_height == 1 && conv.stride_width == 1) return pixel;
  const auto [line, column] = args.out_width.divide(pixel);
  const auto [image, row] = args.out_height.divide(line);
  const int64_t in_line = int64_t{image} * conv.in_height + row * conv.stride_height;
  return in_line * conv.in_width + column * conv.stride_width;
}

// The bits of a tile, which begins with pixel `first`.
template <class T>
__device__ void pack_tile(const PointwiseConv& args, int32_t first) {
  constexpr int kBatch = 128 / sizeof(Piece<T>);  // With all their loads in flight.
  const float* const thresholds = args.threshold.per_channel;
  const Comparison<T> compare(args.threshold.value);
  const int32_t pixels = min(args.tile_pixels, args.pixels - first);
  const int32_t count = pixels * static_cast<int32_t>(args.pixel_pieces.value);
  for (int32_t start = threadIdx.x; start < count; start += kBatch * kThreads) {
    Piece<T> batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int32_t i = start + k * kThreads;
      if (i >= count) continue;
      const auto [pixel, piece] = args.pixel_pieces.divide(i);
      const int64_t from = source_pixel(args, first + pixel) * args.in_channels;
      const T* x = static_cast<const T*>(args.x) + from + piece * kPieceValues<T>;
      batch[k] = *reinterpret_cast<const Piece<T>*>(x);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int32_t i = start + k * kThreads;
      if (i >= count) continue;
      const auto [pixel, piece] = args.pixel_pieces.divide(i);
      uint32_t bits;
      if (thresholds) {
        float of_values[kPieceValues<T>];
        load_thresholds(thresholds, args.in_channels, 0, piece * kPieceValues<T>, of_values);
        bits = compare_each(batch[k], of_values);
      } else {
        bits = compare(batch[k]);
      }
      shared<uint8_t>(args.bits_at)[pixel * args.pitch * kChunkBytes + piece] =
          static_cast<uint8_t>(bits);
    }
  }
}

// What a lane has of 16 pixels and 32 channels, and of 8 columns of ones.
using Sums = int32_t[4 * (kColumnBlocks + 1)];

// pixel: the first of the warp's, in the tile. channel: the first of its channels.
__device__ void multiply_run(const PointwiseConv& args, int32_t pixel, int32_t channel,
                             Sums& sums) {
  const HaloConv& conv = args.tile.conv;
  const int32_t lane = threadIdx.x % kWarpSize;
  const auto* rows =
      shared<cute::uint128_t>(args.bits_at) + (pixel + lane % kWarpPixels) * args.pitch;
  const int32_t half = lane / kWarpPixels;  // Whether the lane loads from the second chunk.
  // A lane's words of a core matrix, which lie side by side over the warp.
  const auto* words = reinterpret_cast<const uint32_t*>(conv.weights) +
                      int64_t{channel / kCoreRows} * conv.chunks * kWarpSize + lane;
  for (int32_t chunk = 0; chunk < conv.chunks; chunk += 2) {
    const bool is_pair = chunk + 1 < conv.chunks;
    uint32_t a[4];
    cute::SM75_U32x4_LDSM_N::copy(rows[is_pair ? chunk + half : chunk], a[0], a[1], a[2], a[3]);
    if (!is_pair) a[2] = a[3] = 0;
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const uint32_t* pair = words + (j * conv.chunks + chunk) * kWarpSize;
      mma_and_popcount(sums + 4 * j, a, pair[0], is_pair ? pair[kWarpSize] : 0);
    }
    mma_and_popcount(sums + 4 * kColumnBlocks, a, ~0u, ~0u);
  }
}

// first: the tile's first pixel. pixel, column: the warp's, in the tile and the block.
__device__ void convolve_run(const PointwiseConv& args, int32_t first, int32_t pixel,
                             int32_t column) {
  const HaloConv& conv = args.tile.conv;
  Sums sums = {};
  multiply_run(args, pixel, first_channel(conv) + column, sums);
  const Lane lane = make_lane(args.tile, column);
  const LaneScale<kGroup, false> scale(lane);
  WarpRun<kGroup> run = locate_run<kGroup>(conv, lane, [&](int32_t number) {
    const int32_t index = first + pixel + number;
    return Pixel{0, index < args.pixels ? index : -1};
  });
  run.acc = sums;
#pragma unroll
  for (int row = 0; row < kLanePixels; ++row) {
    run.window_bits[row] = sums[4 * kColumnBlocks + 2 * row];
  }
  store_run(args.tile, lane, run, scale, load_table(run, 0));
}

// What no value fills: the bytes behind a pixel's channels.
__device__ void clear_bits(const PointwiseConv& args) {
  uint4* const chunks = shared<uint4>(args.bits_at);
  for (int32_t i = threadIdx.x; i < args.tile_pixels * args.pitch; i += kThreads) {
    chunks[i] = uint4{};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    conv2d_kernel(const __grid_constant__ PointwiseConv args) {
#if __CUDA_ARCH__ >= 800
  const auto& [conv, out] = args.tile;
  clear_bits(args);
  await_previous_kernel();
  prepare_channels(args.tile, threadIdx.x, kThreads);
  __syncthreads();
  const int32_t channels =
      min(conv.plan.block_channels, static_cast<int32_t>(out.channels) - first_channel(conv));
  const int32_t rows = args.tile_pixels / kWarpPixels, units = rows * ceil_div(channels, kGroup);
  for (int32_t tile = blockIdx.x; tile < conv.plan.tiles; tile += gridDim.x) {
    const int32_t first = tile * args.tile_pixels;
    pack_tile<T>(args, first);
    __syncthreads();
    for (int32_t i = threadIdx.x / kWarpSize; i < units; i += kWarps) {
      convolve_run(args, first, i % rows * kWarpPixels, i / rows * kGroup);
    }
    __syncthreads();
  }
#endif
}

int64_t channel_blocks(const Conv2dShape& shape) {
  return ceil_div<int64_t>(shape.weight.out_channels, kMostChannels);
}

// As much of a plan as the epilogue looks at.
HaloPlan plan_of(const Conv2dShape& shape, int32_t tiles) {
  const int64_t channels = shape.weight.out_channels;
  HaloPlan plan = {};
  plan.block_channels = plan.columns = channels <= 32 ? 32 : channels <= 64 ? 64 : kMostChannels;
  plan.tile_rows = plan.tile_columns = plan.tile_images = 1;
  plan.row_tiles = plan.column_tiles = plan.runs = 1;
  plan.phases_height = plan.phases_width = plan.halo_rows = plan.pitch = 1;
  plan.region_pixels = 8;
  plan.stage_chunks = plan.part_chunks = plan.part_taps = 1;
  plan.tiles = tiles;
  plan.row_border = {1, 0, static_cast<int32_t>(shape.out_height())};
  plan.column_border = {1, 0, static_cast<int32_t>(shape.out_width())};
  return plan;
}

}  // namespace

bool pointwise_takes(const Conv2dShape& shape, const Values& x) {
  const WeightShape& weight = shape.weight;
  const bool is_pointwise = weight.kernel_height == 1 && weight.kernel_width == 1 &&
                            weight.groups == 1 && shape.pad_top == 0 && shape.pad_left == 0 &&
                            shape.pad_bottom == 0 && shape.pad_right == 0;
  const bool has_pieces = x.layout == Layout::kNHWC && x.type != DataType::kInt8 &&
                          weight.in_channels % 8 == 0 &&
                          reinterpret_cast<uintptr_t>(x.data) % (8 * element_bytes(x.type)) == 0;
  if (!is_pointwise || !has_pieces || weight.in_channels > kMostInChannels ||
      weight.out_channels > kMostOutChannels) {
    return false;
  }
  const int64_t pixels = shape.batch * shape.out_height() * shape.out_width();
  const int64_t values = pixels * weight.in_channels * channel_blocks(shape);
  const bool skips_pixels = shape.stride_height * shape.stride_width >= 4;
  return pixels <= kReach && (skips_pixels || values <= kMostValues);
}

void launch_pointwise(const Conv2dArgs& args, const Values& x, const Queue& queue) {
  const Conv2dShape& shape = args.shape;
  const int32_t in_channels = static_cast<int32_t>(shape.weight.in_channels);
  const int64_t pixels = shape.batch * shape.out_height() * shape.out_width();
  const int64_t workers =
      std::max<int64_t>(1, kBlocks * multiprocessors(queue.device()) / channel_blocks(shape));
  const int32_t pitch = static_cast<int32_t>(packed_bytes(in_channels)) / kChunkBytes | 1;
  int32_t tile_pixels = kMostPixels;
  while (tile_pixels > kWarpPixels && (tile_pixels * pitch * kChunkBytes > kMostBytes ||
                                       ceil_div<int64_t>(pixels, tile_pixels) < workers)) {
    tile_pixels /= 2;
  }
  const int32_t tiles = static_cast<int32_t>(ceil_div<int64_t>(pixels, tile_pixels));
  const TileConv tile = tile_conv(args, plan_of(shape, tiles));
  const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(value)); };
  const PointwiseConv conv = {.tile = tile,
                              .x = x.data,
                              .threshold = x.threshold,
                              .in_channels = in_channels,
                              .pixels = static_cast<int32_t>(pixels),
                              .tile_pixels = tile_pixels,
                              .pitch = pitch,
                              .bits_at = tile.conv.at.total,
                              .pixel_pieces = divisor(in_channels / 8),
                              .out_width = divisor(shape.out_width()),
                              .out_height = divisor(shape.out_height())};
  const dim3 blocks(static_cast<unsigned>(std::min<int64_t>(tiles, workers)),
                    static_cast<unsigned>(channel_blocks(shape)));
  const size_t bytes = tile.conv.at.total + size_t{1} * tile_pixels * pitch * kChunkBytes;
  dispatch_float_type(x.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("binary_conv2d", queue, {blocks, kThreads, bytes}, conv2d_kernel<T>, conv);
  });
}

}  // namespace binconv::cuda
