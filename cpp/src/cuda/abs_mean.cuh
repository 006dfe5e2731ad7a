#pragma once

#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"

// The mean magnitude of a row by one block: the same number in every kernel.

namespace binconv::cuda {

constexpr int kMeanThreads = 1024;  // At most.

// The threads of a block. In which order it adds depends on them.
template <class T>
int mean_threads(int64_t columns) {
  const int64_t warps = ceil_div<int64_t>(columns, kVectorWidth<T> * kWarpSize);
  return static_cast<int>(std::min<int64_t>(warps * kWarpSize, kMeanThreads));
}

__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kWholeWarp, value, distance);
  }
  return value;
}

// The sum over the block's threads, in thread 0. All threads call.
__device__ inline double block_sum(double value) {
  __shared__ double partial[kMeanThreads / kWarpSize];
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

// All threads call.
template <class T>
__device__ void write_abs_mean(const T* row, int64_t columns, float* out) {
  const double sum = block_sum(is_vector_aligned(row) ? thread_sum<true>(row, columns)
                                                      : thread_sum<false>(row, columns));
  if (threadIdx.x == 0) *out = static_cast<float>(sum / static_cast<double>(columns));
}

}  // namespace binconv::cuda
