#pragma once

#include <cstdint>

#include "binconv/export.h"
#include "binconv/types.h"

// The backward pass of a binary convolution, without its two convolutions: these are of floats and
// left to a library for floats. For y = conv2d(sign(x), sign(W)) * scale, with G = dL/dy and
// clipped straight-through estimators (Hubara et al., 2016, arXiv:1602.02830) for both signs, the
// gradients are
//
//     dL/dx = conv_transpose2d(G, scale * sign(W))  where |x| <= limit, else 0
//     dL/dW = scale * corr(G, sign(x))              where |W| <= limit, else 0
//
// with corr(G, s) the gradient of conv2d(s, .) that G gives. sign_values and scaled_signs make the
// operands, mask_values and weight_gradient finish the results.
//
// Signs and mask of x come as bits: as pack_bits_and_clip writes them, or, to keep less, each pixel
// cut to the bytes that its channels need. So these functions take the bytes from one pixel to the
// next, pixel_bytes, at least ceil(channels / 8), and bits of any alignment, in the order of
// bits.h; they do not read bits beyond the last channel.
//
// Values are aligned to their element size. Errors: kInvalidArgument for sizes below 0 or that
// pack_bits does not take, arrays of 2^63 bytes and more, a pixel_bytes too small, a null or
// misaligned pointer, or a type that the function does not take. A call on no values does nothing.

namespace binconv {

// x = +1 or -1 for every bit. `type` is kFloat32, kFloat16 or kBFloat16, x dense in `layout`.
BINCONV_API void sign_values(const ImageShape& shape, const void* bits, int64_t pixel_bytes,
                             void* x, DataType type, Layout layout, const Queue& queue);

// x = 0 (+0.0) for every bit that is 0, in place; elsewhere x stays what it is. Types as above.
BINCONV_API void mask_values(const ImageShape& shape, const void* bits, int64_t pixel_bytes,
                             void* x, DataType type, Layout layout, const Queue& queue);

// out[r][i] = scale[r] where weight[r][i] >= 0, else -scale[r], rounded once to out_type: a weight
// of NaN counts as negative. Both dense [rows][columns] in the same order, such as OIHW or OHWI
// with rows = out_channels. weight is kFloat32, kFloat16, kBFloat16 or kInt8, out one of the first
// three. scale: [rows], null for 1.
BINCONV_API void scaled_signs(int64_t rows, int64_t columns, const void* weight,
                              DataType weight_type, const float* scale, void* out,
                              DataType out_type, const Queue& queue);

// out[r][i] = scale[r] * gradient[r][i] where |weight[r][i]| <= limit, else 0 (+0.0): a product in
// float32, which is then rounded to out_type. All three dense [rows][columns] in the same order;
// gradient and out are kFloat32, kFloat16 or kBFloat16, weight one of these or kInt8. out may be
// gradient itself, if their types are the same. scale: [rows], null for 1. limit: at least 0; with
// infinity, the identity as the estimator, every value passes.
BINCONV_API void weight_gradient(int64_t rows, int64_t columns, const void* gradient,
                                 DataType gradient_type, const void* weight, DataType weight_type,
                                 const float* scale, float limit, void* out, DataType out_type,
                                 const Queue& queue);

}  // namespace binconv
