#pragma once

#include "clip_bits.h"
#include "kernel_table.h"
#include "pixel_bits.h"

// The CPU backend: the library's operations on host memory, arguments already checked.

namespace binconv::cpu {

CpuFeatures features();

void pack_bits(const ImageShape& shape, const void* x, DataType type, Layout layout,
               const Threshold& threshold, uint8_t* packed, const ClipBits& clip, int threads);
void abs_mean(int64_t rows, int64_t columns, const void* x, DataType type, float* out, int threads);
void scale_channels(const ImageShape& shape, const void* x, DataType type, Layout layout,
                    const float* scale, void* out, int threads);
void sign_values(const ImageShape& shape, const PixelBits& bits, void* x, DataType type,
                 Layout layout, int threads);
void mask_values(const ImageShape& shape, const PixelBits& bits, void* x, DataType type,
                 Layout layout, int threads);
void scaled_signs(int64_t rows, int64_t columns, const void* weight, DataType weight_type,
                  const float* scale, void* out, DataType out_type, int threads);
void weight_gradient(int64_t rows, int64_t columns, const void* gradient, DataType gradient_type,
                     const void* weight, DataType weight_type, const float* scale, float limit,
                     void* out, DataType out_type, int threads);

extern const Kernel kConv2dAvx512;
extern const Kernel kConv2dAvx2;
extern const Kernel kConv2dNeon;
extern const Kernel kConv2dPortable;

}  // namespace binconv::cpu
