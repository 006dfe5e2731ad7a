#include <cstdlib>
#include <string>

#include "check.h"
#include "cuda/architectures.h"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"

namespace binconv::cuda {
namespace {

int device_count() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "device");
  return count;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error == cudaErrorInvalidDevice) {
    cudaGetLastError();
    fail(Status::kInvalidArgument, "device: got ", device, ", expected the ordinal of one of ",
         device_count(), " CUDA devices");
  }
  check_cuda(error, ("device: got " + std::to_string(device)).c_str());
  return value;
}

}  // namespace

int compute_capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

int shared_bytes(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

std::string_view used_architectures() {
  const char* forces_ptx = std::getenv("CUDA_FORCE_PTX_JIT");
  return forces_ptx && *forces_ptx == '1' ? "" : cuda_architectures();
}

bool kernels_wait(int device) {
  static const bool has_wait = has_code(used_architectures(), "90a");
  return has_wait && compute_capability(device) == 90;
}

int64_t no_workspace(const Conv2dShape&, const Queue&) { return 0; }

std::vector<CudaDevice> devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // No driver or no device is an answer here, not an error to leave behind.
    return {};
  }
  std::vector<CudaDevice> found(count);
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, device), "cuda_devices");
    found[device] = {properties.name, 10 * properties.major + properties.minor};
  }
  return found;
}

}  // namespace binconv::cuda
