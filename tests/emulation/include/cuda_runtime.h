#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "emulation/barriers.h"
#include "emulation/shared_memory.h"
#include "emulation/warps.h"

// CUDA C++ for a host compiler, as far as the library uses it.

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local  // Of the host thread that runs the fibers of a block.
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::isinf;
using std::max;
using std::min;

inline int __popc(unsigned value) { return std::popcount(value); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift % 32));
}
// Byte i is the one that digit i of the selector names, 4 to 7 being those of `high`.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> 4 * i & 7;
    result |= static_cast<unsigned>(bytes >> 8 * digit & 0xff) << 8 * i;
  }
  return result;
}
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

inline void __stwb(uint4* to, const uint4& value) { *to = value; }

inline size_t __cvta_generic_to_shared(const void* pointer) {
  return binconv::emulation::shared_address(pointer);
}

inline void __syncthreads() { binconv::emulation::sync_named(0, blockDim.x); }
inline void __syncwarp(unsigned = ~0u) { binconv::emulation::sync_warp("__syncwarp"); }

namespace binconv::emulation {

template <class T>
T value_of_lane(const char* operation, const T& value, unsigned lane) {
  const LaneValues& values = exchange(operation, &value, sizeof value);
  T other;
  std::memcpy(&other, values[lane % 32], sizeof other);
  return other;
}

}  // namespace binconv::emulation

template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return binconv::emulation::value_of_lane("__shfl_sync", value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return binconv::emulation::value_of_lane("__shfl_xor_sync", value, threadIdx.x % 32 ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return binconv::emulation::value_of_lane("__shfl_down_sync", value,
                                           lane + distance < 32 ? lane + distance : lane);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto& votes = binconv::emulation::exchange("__ballot_sync", &vote, sizeof vote);
  unsigned word = 0;
  for (int lane = 0; lane < 32; ++lane) word |= unsigned{votes[lane][0]} << lane;
  return word;
}

// Launches run one after the other.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
struct cudaDeviceProp {
  const char* name;
  int major, minor;
};
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* current);
cudaError_t cudaSetDevice(int ordinal);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal);

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum { cudaEnableDefault = 0 };
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace binconv::emulation {

cudaError_t allow_shared_bytes(const void* kernel, int bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread);

}  // namespace binconv::emulation

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return binconv::emulation::allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return binconv::emulation::launch(*config, reinterpret_cast<const void*>(kernel),
                                    [&] { kernel(arguments...); });
}
