#include "check.h"
#include "cuda/cuda.h"

namespace binconv::cuda {
namespace {

[[noreturn]] void fail_without_cuda() {
  fail(Status::kNotSupported,
       "queue: got a CUDA stream, but this binconv was built without CUDA; expected a CPU queue");
}

}  // namespace

int compute_capability(int) { fail_without_cuda(); }
std::vector<CudaDevice> devices() { return {}; }

void pack_bits(const ImageShape&, const void*, DataType, Layout, const Threshold&, uint8_t*,
               const ClipBits&, const Queue&) {
  fail_without_cuda();
}
void unpack_bits(const ImageShape&, const uint8_t*, void*, DataType, Layout, const Queue&) {
  fail_without_cuda();
}
void abs_mean(int64_t, int64_t, const void*, DataType, float*, const Queue&) {
  fail_without_cuda();
}
void scale_channels(const ImageShape&, const void*, DataType, Layout, const float*, void*,
                    const Queue&) {
  fail_without_cuda();
}
void sign_values(const ImageShape&, const PixelBits&, void*, DataType, Layout, const Queue&) {
  fail_without_cuda();
}
void mask_values(const ImageShape&, const PixelBits&, void*, DataType, Layout, const Queue&) {
  fail_without_cuda();
}
void scaled_signs(int64_t, int64_t, const void*, DataType, const float*, void*, DataType,
                  const Queue&) {
  fail_without_cuda();
}
void weight_gradient(int64_t, int64_t, const void*, DataType, const void*, DataType, const float*,
                     float, void*, DataType, const Queue&) {
  fail_without_cuda();
}

}  // namespace binconv::cuda
