#include "cuda/abs_mean.cuh"
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

// From the bits in each tap to those in all taps up to its row and column, by one warp: down the
// columns, then along the rows.
__device__ void accumulate(const PreparedLayout& layout, int64_t kernel_width,
                           int32_t* of_channel) {
  const int lane = threadIdx.x % kWarpSize;
  const auto sum = [&](int64_t tap) -> int32_t& { return of_channel[tap * layout.channels]; };
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

// A warp has a channel.
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(PreparedLayout layout, int64_t kernel_width, int64_t out_channels,
                   const uint4* packed, uint4* bits, int32_t* sums) {
  await_previous_kernel();
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t channel = grid_index() / kWarpSize; channel < layout.channels;
       channel += grid_step() / kWarpSize) {
    for (int64_t tap = lane; tap < layout.taps; tap += kWarpSize) {
      const uint4* from = packed + (channel * layout.taps + tap) * layout.chunks;
      int32_t count = 0;
      for (int64_t k = 0; k < layout.chunks; ++k) {
        const uint4 chunk = channel < out_channels ? from[k] : uint4{};
        bits[layout.chunk_index(channel, k, tap)] = chunk;
        count += count_bits(chunk);
      }
      sums[tap * layout.channels + channel] = count;
    }
    __syncwarp();
    accumulate(layout, kernel_width, sums + channel);
  }
}

// Where the values of a filter are.
struct Filter {
  int64_t channels, channel_step, tap_step, kernel_width;
};

// The bits of a chunk of values, of which a lane has every 32nd; all lanes call.
template <class T>
__device__ uint4 pack_chunk(const T* values, int64_t first, const Filter& filter) {
  const int lane = threadIdx.x % kWarpSize;
  const auto word = [&](int j) {
    const int64_t channel = first + j * kWarpSize + lane;
    const bool is_one =
        channel < filter.channels && to_float(values[channel * filter.channel_step]) >= 0.0f;
    return __ballot_sync(kWholeWarp, is_one);
  };
  return {word(0), word(1), word(2), word(3)};
}

// A block has a channel, a warp a tap at a time.
template <class T>
__global__ void __launch_bounds__(kMeanThreads)
    prepare_values_kernel(PreparedLayout layout, Filter filter, int64_t out_channels,
                          const T* weight, uint4* bits, int32_t* sums, float* means) {
  await_previous_kernel();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  const int64_t columns = filter.channels * layout.taps;
  for (int64_t channel = blockIdx.x; channel < layout.channels; channel += gridDim.x) {
    const bool exists = channel < out_channels;
    const T* row = weight + channel * columns;
    if constexpr (!std::is_same_v<T, int8_t>) {
      if (means && exists) write_abs_mean(row, columns, means + channel);
    }
    for (int64_t tap = warp; tap < layout.taps; tap += warps) {
      int32_t count = 0;
      for (int64_t k = 0; k < layout.chunks; ++k) {
        uint4 chunk = {};
        if (exists) chunk = pack_chunk(row + tap * filter.tap_step, k * kChunkBits, filter);
        if (lane == 0) bits[layout.chunk_index(channel, k, tap)] = chunk;
        count += count_bits(chunk);
      }
      if (lane == 0) sums[tap * layout.channels + channel] = count;
    }
    __syncthreads();
    if (warp == 0) accumulate(layout, filter.kernel_width, sums + channel);
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

void prepare_values(const WeightShape& shape, const WeightValues& weight, uint8_t* prepared,
                    float* means, const Queue& queue) {
  const PreparedLayout layout = prepared_layout(shape);
  const int64_t channels = shape.in_channels / shape.groups;
  const bool by_tap = weight.layout == Layout::kNHWC;
  const Filter filter = {channels, by_tap ? 1 : layout.taps, by_tap ? channels : 1,
                         shape.kernel_width};
  dispatch_value_type(weight.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("prepare_weight", queue, layout.channels, mean_threads<T>(channels * layout.taps),
           prepare_values_kernel<T>, layout, filter, shape.out_channels,
           static_cast<const T*>(weight.data), reinterpret_cast<uint4*>(prepared),
           reinterpret_cast<int32_t*>(prepared + layout.bit_bytes()), means);
  });
}

}  // namespace binconv::cuda
