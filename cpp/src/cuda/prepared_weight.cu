#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"
#include "cuda/prepared_weight.h"

namespace binconv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kChannelBlock = 128;

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(PreparedLayout layout, int64_t out_channels, int64_t packed_chunks,
                   const uint4* packed, uint4* bits, int32_t* tap_counts) {
  const int64_t step = layout.taps * layout.channels;
  for (int64_t i = grid_index(); i < step; i += grid_step()) {
    const int64_t tap = i / layout.channels, channel = i - tap * layout.channels;
    const uint4* from = packed + (channel * layout.taps + tap) * packed_chunks;
    int32_t count = 0;
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
      const uint4 v = channel < out_channels ? from[chunk] : uint4{};
      bits[chunk * step + i] = v;
      count += __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
    }
    tap_counts[i] = count;
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
  launch("prepare_weight", queue, ceil_div<int64_t>(layout.taps * layout.channels, kThreads),
         kThreads, prepare_kernel, layout, shape.out_channels, layout.chunks,
         reinterpret_cast<const uint4*>(packed), reinterpret_cast<uint4*>(prepared),
         reinterpret_cast<int32_t*>(prepared + layout.bit_bytes()));
}

}  // namespace binconv::cuda
