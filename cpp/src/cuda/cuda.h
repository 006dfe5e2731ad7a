#pragma once

#include <vector>

#include "binconv/kernels.h"
#include "kernel_table.h"

// The CUDA backend: the library's operations on device memory, arguments already checked, queued on
// the queue's stream. This header needs no CUDA; a build without CUDA has the same functions in
// absent.cpp, where each throws kNotSupported.

namespace binconv::cuda {

int compute_capability(
    int device);  // 10 * major + minor; throws for an ordinal that does not exist.
std::vector<CudaDevice> devices();

void pack_bits(const ImageShape& shape, const void* x, DataType type, Layout layout,
               const Threshold& threshold, uint8_t* packed, const Queue& queue);
void unpack_bits(const ImageShape& shape, const uint8_t* packed, void* x, DataType type,
                 Layout layout, const Queue& queue);
void abs_mean(int64_t rows, int64_t columns, const void* x, DataType type, float* out,
              const Queue& queue);
void scale_channels(const ImageShape& shape, const void* x, DataType type, Layout layout,
                    const float* scale, void* out, const Queue& queue);

extern const Kernel kConv2dDirect;

}  // namespace binconv::cuda
