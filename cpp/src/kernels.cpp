#include "binconv/kernels.h"

#include "cuda/cuda.h"
#include "kernel_table.h"

namespace binconv {

const char* version() { return BINCONV_VERSION; }

const char* cuda_architectures() { return BINCONV_CUDA_ARCHITECTURES; }

std::vector<CudaDevice> cuda_devices() { return cuda::devices(); }

std::vector<std::string> available_kernels(const Queue& queue) {
  const Target target = target_of(queue);
  std::vector<std::string> names;
  for (const Kernel* kernel : kernel_table()) {
    if (kernel->runs_on(target)) names.push_back(kernel->name);
  }
  return names;
}

}  // namespace binconv
