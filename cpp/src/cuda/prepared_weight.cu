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

// Each thread has one column of one channel's taps, from the first row to the last.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(PreparedLayout layout, int64_t kernel_width, int64_t out_channels,
                   const uint4* packed, uint4* bits, int32_t* sums) {
  const int64_t threads = kernel_width * layout.channels;
  for (int64_t i = grid_index(); i < threads; i += grid_step()) {
    const int64_t column = i / layout.channels, channel = i - column * layout.channels;
    const bool is_channel = channel < out_channels;
    const uint4* row = packed + channel * layout.taps * layout.chunks;
    int32_t sum = 0;  // Of the taps up to this row and column.
    for (int64_t tap = column; tap < layout.taps; tap += kernel_width) {
      for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
        bits[layout.chunk_index(channel, chunk, tap)] =
            is_channel ? row[column * layout.chunks + chunk] : uint4{};
      }
      for (int64_t k = 0; is_channel && k < (column + 1) * layout.chunks; ++k) {
        sum += count_bits(row[k]);
      }
      sums[tap * layout.channels + channel] = sum;
      row += kernel_width * layout.chunks;
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
  launch("prepare_weight", queue, ceil_div<int64_t>(shape.kernel_width * layout.channels, kThreads),
         kThreads, prepare_kernel, layout, shape.kernel_width, shape.out_channels,
         reinterpret_cast<const uint4*>(packed), reinterpret_cast<uint4*>(prepared),
         reinterpret_cast<int32_t*>(prepared + layout.bit_bytes()));
}

}  // namespace binconv::cuda
