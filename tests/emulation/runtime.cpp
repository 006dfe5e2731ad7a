#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "emulation/copies.h"
#include "emulation/fibers.h"
#include "emulation/gpu.h"

// The CUDA runtime's host functions, as far as the library calls them.

namespace {

using binconv::emulation::device;
using binconv::emulation::kComputeCapability;

constexpr int kDefaultSharedBytes = 48 * 1024;
constexpr unsigned kMaxBlocksY = 65535;

std::string last_failure;

std::map<const void*, int>& allowed_shared_bytes() {
  static std::map<const void*, int> of_kernels;
  return of_kernels;
}

std::mutex& attribute_mutex() {
  static std::mutex mutex;
  return mutex;
}

int allowed_shared(const void* kernel) {
  const std::lock_guard lock(attribute_mutex());
  const auto found = allowed_shared_bytes().find(kernel);
  return found == allowed_shared_bytes().end() ? kDefaultSharedBytes : found->second;
}

}  // namespace

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? last_failure.c_str() : "refused by the emulation";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* current) {
  *current = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  return ordinal == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  if (ordinal != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = kComputeCapability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kComputeCapability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = device().multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device().shared_bytes;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal) {
  if (ordinal != 0) return cudaErrorInvalidDevice;
  *properties = {"emulated", kComputeCapability / 10, kComputeCapability % 10};
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&binconv::emulation::encode_tensor_map);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace binconv::emulation {

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes > device().shared_bytes) return cudaErrorInvalidValue;
  const std::lock_guard lock(attribute_mutex());
  allowed_shared_bytes()[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread) {
  const dim3& blocks = config.gridDim;
  const bool is_valid = blocks.x > 0 && blocks.y > 0 && blocks.y <= kMaxBlocksY && blocks.z == 1 &&
                        config.blockDim.x > 0 && config.blockDim.x <= kMaxThreads &&
                        config.blockDim.x % kWarpSize == 0 &&
                        static_cast<int64_t>(config.dynamicSmemBytes) <= allowed_shared(kernel);
  if (!is_valid) return cudaErrorInvalidValue;
  try {
    run_grid(blocks, config.blockDim, static_cast<int64_t>(config.dynamicSmemBytes), thread);
  } catch (const Failure& failure) {
    last_failure = failure.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace binconv::emulation
