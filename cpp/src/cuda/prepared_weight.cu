#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/prepared_weight.h"

namespace binconv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kChannelBlock = 128;

__device__ int32_t count_bits(const uint4& chunk) {
  return __popc(chunk.x) + __popc(chunk.y) + __popc(chunk.z) + __popc(chunk.w);
}

// A warp has a channel: it copies and counts the bits of each tap, then adds the counts down the
// columns and along the rows.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(PreparedLayout layout, int64_t kernel_width, int64_t out_channels,
                   const uint4* packed, uint4* bits, int32_t* sums) {
  await_previous_kernel();
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t channel = grid_index() / kWarpSize; channel < layout.channels;
       channel += grid_step() / kWarpSize) {
    const auto sum = [&](int64_t tap) -> int32_t& { return sums[tap * layout.channels + channel]; };
    for (int64_t tap = lane; tap < layout.taps; tap += kWarpSize) {
      const uint4* from = packed + (channel * layout.taps + tap) * layout.chunks;
      int32_t count = 0;
      for (int64_t k = 0; k < layout.chunks; ++k) {
        const uint4 chunk = channel < out_channels ? from[k] : uint4{};
        bits[layout.chunk_index(channel, k, tap)] = chunk;
        count += count_bits(chunk);
      }
      sum(tap) = count;
    }
    __syncwarp();
    for (int64_t column = lane; column < kernel_width; column += kWarpSize) {
      for (int64_t tap = column + kernel_width; tap < layout.taps; tap += kernel_width) {
        sum(tap) += sum(tap - kernel_width);
      }
    }
    __syncwarp();
    for (int64_t row = lane * kernel_width; row < layout.taps; row += kWarpSize * kernel_width) {
      for (int64_t tap = row + 1; tap < row + kernel_width; ++tap) sum(tap) += sum(tap - 1);
    }
  }
}

}  // namespace

PreparedLayout prepared_layout(const WeightShape& shape) {
  return {.chunks = ceil_div<int64_t>(shape.in_channels / shape.groups, kChunkBits),
          .taps = shape.kernel_height * shape.kernel_width,
          .channels = ceil_div<int64_t>(shape.out_channels, kChannelBlock) * kChannelBlock};
}

int64_t prepared_bytes(const WeightShape& shape) { return prepared_layout(shape).bytes(); }

void prepare_weight(const WeightShape& shape, const uint8_t* packed, uint8_t* prepared,
                    const Queue& queue) {
  const PreparedLayout layout = prepared_layout(shape);
  launch("prepare_weight", queue, ceil_div<int64_t>(layout.channels * kWarpSize, kThreads),
         kThreads, prepare_kernel, layout, shape.kernel_width, shape.out_channels,
         reinterpret_cast<const uint4*>(packed), reinterpret_cast<uint4*>(prepared),
         reinterpret_cast<int32_t*>(prepared + layout.bit_bytes()));
}

}  // namespace binconv::cuda
