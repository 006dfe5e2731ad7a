#include "check.h"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"

namespace binconv::cuda {
namespace {

constexpr int kMaxThreads = 1024;

__device__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kWholeWarp, value, distance);
  }
  return value;
}

// The sum over the block's threads, in thread 0. All threads call.
__device__ double block_sum(double value) {
  __shared__ double partial[kMaxThreads / kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const double sum = warp_sum(value);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  const double total = warp == 0 ? warp_sum(lane < warps ? partial[lane] : 0.0) : 0.0;
  __syncthreads();
  return total;
}

// x[first ...], with zeros from `end` on.
template <bool kAligned, class T>
__device__ Vector<T, kVectorWidth<T>> load_padded(const T* x, int64_t first, int64_t end) {
  constexpr int kWidth = kVectorWidth<T>;
  if (kAligned && first + kWidth <= end) return load_vector<kWidth>(x + first);
  Vector<T, kWidth> vector;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    vector.values[i] = first + i < end ? x[first + i] : from_float<T>(0.0f);
  }
  return vector;
}

// This thread's part of a row's sum. Which values those are, and in which order they are added,
// does not depend on kAligned: results are the same wherever the row lies in memory.
template <bool kAligned, class T>
__device__ double thread_sum(const T* row, int64_t columns) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kBatch = 4;  // Loads in flight.
  const int64_t step = int64_t{blockDim.x} * kWidth;
  double sum = 0.0;
  for (int64_t i = threadIdx.x * kWidth; i < columns; i += kBatch * step) {
    Vector<T, kWidth> batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) batch[k] = load_padded<kAligned>(row, i + k * step, columns);
#pragma unroll
    for (const Vector<T, kWidth>& vector : batch) {
#pragma unroll
      for (const T& value : vector.values) sum += fabsf(to_float(value));
    }
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    abs_mean_kernel(int64_t rows, int64_t columns, const T* x, float* out) {
  await_previous_kernel();
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const T* row = x + i * columns;
    const double sum = block_sum(is_vector_aligned(row) ? thread_sum<true>(row, columns)
                                                        : thread_sum<false>(row, columns));
    if (threadIdx.x == 0) out[i] = static_cast<float>(sum / static_cast<double>(columns));
  }
}

constexpr int kScaleThreads = 256;

// The channel changes every `inner` values: 1 for kNHWC, a plane for kNCHW.
template <int kWidth, class T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_channels_kernel(int64_t vectors, int64_t inner, int32_t channels, const T* x,
                          const float* scale, T* out) {
  await_previous_kernel();
  for (int64_t i = grid_index(); i < vectors; i += grid_step()) {
    const int64_t group = i * kWidth / inner;
    int64_t position = i * kWidth - group * inner;
    int32_t channel = static_cast<int32_t>(group % channels);
    Vector<T, kWidth> vector = load_vector<kWidth>(x + i * kWidth);
#pragma unroll
    for (T& value : vector.values) {
      value = from_float<T>(__fmul_rn(to_float(value), scale[channel]));
      if (++position < inner) continue;
      position = 0;
      if (++channel == channels) channel = 0;
    }
    store_vector(out + i * kWidth, vector);
  }
}

}  // namespace

void abs_mean(int64_t rows, int64_t columns, const void* x, DataType type, float* out,
              const Queue& queue) {
  dispatch_float_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t warps = ceil_div<int64_t>(columns, kVectorWidth<T> * kWarpSize);
    const int threads = static_cast<int>(std::min<int64_t>(warps * kWarpSize, kMaxThreads));
    launch("abs_mean", queue, rows, threads, abs_mean_kernel<T>, rows, columns,
           static_cast<const T*>(x), out);
  });
}

void scale_channels(const ImageShape& shape, const void* x, DataType type, Layout layout,
                    const float* scale, void* out, const Queue& queue) {
  const int64_t plane_pixels = shape.height * shape.width;
  const int64_t count = shape.batch * shape.channels * plane_pixels;
  const int64_t inner = layout == Layout::kNCHW ? plane_pixels : 1;
  dispatch_float_type(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool has_vectors =
        is_vector_aligned(x) && is_vector_aligned(out) && count % kVectorWidth<T> == 0;
    dispatch_bool(has_vectors, [&](auto vectors) {
      constexpr int kWidth = vectors ? kVectorWidth<T> : 1;
      launch("scale_channels", queue, ceil_div<int64_t>(count / kWidth, kScaleThreads),
             kScaleThreads, scale_channels_kernel<kWidth, T>, count / kWidth, inner,
             static_cast<int32_t>(shape.channels), static_cast<const T*>(x), scale,
             static_cast<T*>(out));
    });
  });
}

}  // namespace binconv::cuda
