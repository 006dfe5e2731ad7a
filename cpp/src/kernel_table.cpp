#include "kernel_table.h"

#include <cstring>

#include "check.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace binconv {

std::span<const Kernel* const> kernel_table() {
  static constexpr const Kernel* kTable[] = {
#if defined(BINCONV_CUDA)
      &cuda::kConv2dSm90,    &cuda::kConv2dSm80, &cuda::kConv2dDirect,
#endif
#if defined(__x86_64__)
      &cpu::kConv2dAvx512,   &cpu::kConv2dAvx2,
#endif
#if defined(__aarch64__)
      &cpu::kConv2dNeon,
#endif
      &cpu::kConv2dPortable,
  };
  return kTable;
}

Target target_of(const Queue& queue) {
  Target target;
  target.is_cuda = queue.is_cuda();
  if (target.is_cuda) {
    target.compute_capability = cuda::compute_capability(queue.device());
  } else {
    target.cpu = cpu::features();
  }
  return target;
}

const Kernel& weight_kernel(const Target& target, const char* forced) {
  bool known = false;
  for (const Kernel* kernel : kernel_table()) {
    if (forced && std::strcmp(kernel->name, forced) != 0) continue;
    known = true;
    if (kernel->runs_on(target)) return *kernel;
  }
  require(known || !forced, "kernel: got \"", forced ? forced : "",
          "\", expected a name from available_kernels");
  if (forced) fail(Status::kNotSupported, "kernel: ", forced, " cannot run on this queue's device");
  fail(Status::kNotSupported, "queue: got a GPU of compute capability ",
       target.compute_capability / 10, ".", target.compute_capability % 10,
       ", expected 7.5 or above");
}

const Kernel& select_kernel(const Conv2dShape& shape, const Target& target, const char* forced) {
  const Kernel& format = weight_kernel(target, forced);
  for (const Kernel* kernel : kernel_table()) {
    if (forced && std::strcmp(kernel->name, forced) != 0) continue;
    if (kernel->runs_on(target) && kernel->prepare == format.prepare && kernel->accepts(shape)) {
      return *kernel;
    }
  }
  fail(Status::kNotSupported, "kernel: ", format.name, " does not take this shape");
}

}  // namespace binconv
