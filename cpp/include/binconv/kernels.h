#pragma once

#include <string>
#include <vector>

#include "binconv/export.h"
#include "binconv/types.h"

// What this build of the library can run, and where.

namespace binconv {

// "major.minor.patch".
BINCONV_API const char* version();

// Names of the convolution kernels that can run on this queue's device, best first: what
// binary_conv2d chooses from and what Queue::with_kernel accepts. Throws kNotSupported for a CUDA
// queue in a CPU-only build.
BINCONV_API std::vector<std::string> available_kernels(const Queue& queue);

// GPU architectures with compiled code, as given to CMake ("75-virtual 80-real ..."); "" if built
// without CUDA.
BINCONV_API const char* cuda_architectures();

struct CudaDevice {
  std::string name;
  int compute_capability = 0;  // 10 * major + minor: 90 for an H200.
};

// The CUDA devices that the process sees, by ordinal; empty without a driver, a device or CUDA
// support.
BINCONV_API std::vector<CudaDevice> cuda_devices();

}  // namespace binconv
