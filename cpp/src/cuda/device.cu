#include <string>

#include "check.h"
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
