#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "check.h"
#include "cuda/cuda.h"

// How the host side of this folder starts kernels.

namespace binconv::cuda {

inline void check_cuda(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return;
  // The exception reports it; the application's next check must not find it again.
  cudaGetLastError();
  fail(Status::kCudaError, operation, ": ", cudaGetErrorString(error));
}

// Makes a device current while it lives.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* operation) {
    check_cuda(cudaGetDevice(&previous_), operation);
    // Also where it is current already: this gives the thread the context that driver calls need.
    check_cuda(cudaSetDevice(device), operation);
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

struct Launch {
  dim3 blocks;
  int threads;
  size_t shared_bytes = 0;
};

// Every kernel calls this before it touches global memory. Its start, and what it does before,
// overlap with the end of the kernel in front of it in the stream (programmatic dependent launch).
__device__ inline void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <class... Parameters, class... Arguments>
void launch(const char* operation, const Queue& queue, const Launch& shape,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  const DeviceGuard guard(queue.device(), operation);
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (shape.shared_bytes > kDefaultSharedBytes) {
    // The limit is the process's. Set to what this launch needs, another thread could lower it
    // before the launch.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_bytes(queue.device())),
               operation);
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = queue.stream();
  config.attrs = &overlap;
  config.numAttrs = kernels_wait(queue.device()) ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), operation);
}

// For kernels that loop until their work is done, whatever gridDim is: a grid holds at most
// 2^31 - 1 blocks.
template <class... Parameters, class... Arguments>
void launch(const char* operation, const Queue& queue, int64_t blocks, int threads,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  const int64_t limit = std::numeric_limits<int32_t>::max();
  launch(operation, queue, Launch{static_cast<unsigned>(std::min(blocks, limit)), threads}, kernel,
         arguments...);
}

// Run-time choices made compile-time: `function` is called with a tag that carries the type or
// value.
template <class Function>
void dispatch_bool(bool value, const Function& function) {
  value ? function(std::true_type{}) : function(std::false_type{});
}

template <class Function>
void dispatch_float_type(DataType type, const Function& function) {
  switch (type) {
    case DataType::kFloat16:
      return function(std::type_identity<__half>{});
    case DataType::kBFloat16:
      return function(std::type_identity<__nv_bfloat16>{});
    default:
      return function(std::type_identity<float>{});
  }
}

template <class Function>
void dispatch_value_type(DataType type, const Function& function) {
  if (type == DataType::kInt8) return function(std::type_identity<int8_t>{});
  dispatch_float_type(type, function);
}

}  // namespace binconv::cuda
