#pragma once

#include <string_view>
#include <vector>

#include "binconv/kernels.h"
#include "clip_bits.h"
#include "kernel_table.h"
#include "pixel_bits.h"

// The CUDA backend: the library's operations on device memory, arguments already checked, queued on
// the queue's stream. This header needs no CUDA; a build without CUDA has the same functions in
// absent.cpp, where each throws kNotSupported.

namespace binconv::cuda {

// 10 * major + minor; throws for an ordinal that does not exist.
int compute_capability(int device);
int multiprocessors(int device);
int shared_bytes(int device);  // That one thread block can have.
std::vector<CudaDevice> devices();
int64_t no_workspace(const Conv2dShape&, const Queue&);  // For rows of the kernel table.

// cuda_architectures(), or "" where the driver is told to compile all from PTX, in which bodies of
// kernels for tensor cores may be empty.
std::string_view used_architectures();
// Whether the code that a device runs waits by itself for the kernel in front of it.
bool kernels_wait(int device);

void pack_bits(const ImageShape& shape, const void* x, DataType type, Layout layout,
               const Threshold& threshold, uint8_t* packed, const ClipBits& clip,
               const Queue& queue);
void unpack_bits(const ImageShape& shape, const uint8_t* packed, void* x, DataType type,
                 Layout layout, const Queue& queue);
void abs_mean(int64_t rows, int64_t columns, const void* x, DataType type, float* out,
              const Queue& queue);
void scale_channels(const ImageShape& shape, const void* x, DataType type, Layout layout,
                    const float* scale, void* out, const Queue& queue);
void sign_values(const ImageShape& shape, const PixelBits& bits, void* x, DataType type,
                 Layout layout, const Queue& queue);
void mask_values(const ImageShape& shape, const PixelBits& bits, void* x, DataType type,
                 Layout layout, const Queue& queue);
void scaled_signs(int64_t rows, int64_t columns, const void* weight, DataType weight_type,
                  const float* scale, void* out, DataType out_type, const Queue& queue);
void weight_gradient(int64_t rows, int64_t columns, const void* gradient, DataType gradient_type,
                     const void* weight, DataType weight_type, const float* scale, float limit,
                     void* out, DataType out_type, const Queue& queue);

extern const Kernel kConv2dDirect;
extern const Kernel kConv2dSm80;
extern const Kernel kConv2dSm90;

}  // namespace binconv::cuda
