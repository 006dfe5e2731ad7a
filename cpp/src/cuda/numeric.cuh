#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "binconv/types.h"

// Numbers and memory as kernels see them.

namespace binconv::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffff;

template <class Integer>
constexpr __host__ __device__ Integer ceil_div(Integer value, Integer divisor) {
  return (value + divisor - 1) / divisor;
}

// This thread's first index, and its step, in a loop that the whole grid shares.
__device__ inline int64_t grid_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_step() { return int64_t{gridDim.x} * blockDim.x; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(int8_t x) { return x; }

// Rounds to nearest, ties to even. int8_t is for the exact values of unpack_bits.
template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return static_cast<T>(x);
  }
}

// The same for a floating-point type known at run time only.
__device__ inline float load_float(const void* data, DataType type, int64_t index) {
  switch (type) {
    case DataType::kFloat16:
      return to_float(static_cast<const __half*>(data)[index]);
    case DataType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ inline void store_float(void* data, DataType type, int64_t index, float x) {
  switch (type) {
    case DataType::kFloat16:
      static_cast<__half*>(data)[index] = from_float<__half>(x);
      break;
    case DataType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x);
      break;
    default:
      static_cast<float*>(data)[index] = x;
  }
}

// Neighbours in memory that one instruction moves.
template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T values[kWidth];
};

constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVectorWidth = kVectorBytes / sizeof(T);

inline __host__ __device__ bool is_vector_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

template <int kWidth, class T>
__device__ Vector<T, kWidth> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

template <int kWidth, class T>
__device__ void store_vector(T* to, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(to) = vector;
}

}  // namespace binconv::cuda
