#pragma once

#include <cstdint>

#include "binconv/export.h"
#include "binconv/types.h"

// Scale factors of binary networks, as in XNOR-Net (Rastegari et al., 2016): a weight filter W is
// approximated by mean(|W|) * sign(W).

namespace binconv {

// out[r] = mean of |x[r][0..columns)|, float32. x is kFloat32, kFloat16 or kBFloat16, dense
// [rows][columns]. For an OIHW weight: per output channel with rows = out_channels, per tensor with
// rows = 1. Summed in double, in an order that depends only on the sizes and the device: results
// repeat exactly. A mean of no values (columns = 0) is an error.
BINCONV_API void abs_mean(int64_t rows, int64_t columns, const void* x, DataType type, float* out,
                          const Queue& queue);

// out[n][c][h][w] = x[n][c][h][w] * scale[c], computed in float32 and rounded once to `type`, which
// is kFloat32, kFloat16 or kBFloat16 for both. Both dense in `layout`; out may be x itself.
BINCONV_API void scale_channels(const ImageShape& shape, const void* x, DataType type,
                                Layout layout, const float* scale, void* out, const Queue& queue);

}  // namespace binconv
