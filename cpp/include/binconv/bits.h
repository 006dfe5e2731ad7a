#pragma once

#include <cstdint>

#include "binconv/export.h"
#include "binconv/types.h"

// Packed bits: one bit per value, 1 for +1 and 0 for -1.
//
// A packed image is [batch][height][width][packed_bytes(channels)], whatever the layout of the
// values it was made from. Within a pixel, channel c is bit c % 8 of byte c / 8, least significant
// bit first: channel 33 is bit 1 of byte 4. A pixel takes a multiple of 16 bytes (128 channels);
// the bits beyond the last channel are zero. Every function here keeps that invariant and
// binary_conv2d relies on it. A packed weight is the same thing with batch = out_channels and
// channels = in_channels / groups.
//
// Pointers to packed data are 16-byte aligned, pointers to values aligned to their element size.
// Errors: kInvalidArgument for channels below 1, another size below 0, any size but the batch above
// 2^31 - 1, arrays of 2^63 bytes and more, a null or misaligned pointer, or a type that the
// function does not take. A call on no pixels does nothing.

namespace binconv {

// 16 * ceil(channels / 128): the bytes of one pixel. Throws for channels < 1.
BINCONV_API int64_t packed_bytes(int64_t channels);

// The bytes of a whole packed image.
BINCONV_API int64_t packed_image_bytes(const ImageShape& shape);

// What becomes a 1: values x >= threshold. With the default, -0.0 gives +1 and NaN gives -1.
struct Threshold {
  float value = 0.0f;
  const float* per_channel = nullptr;  // [channels]; replaces `value` when set.
};

// packed = bits of x >= threshold. x is kFloat32, kFloat16, kBFloat16 or kInt8, dense in `layout`.
// The comparison is done in float32, which holds every value of these types.
BINCONV_API void pack_bits(const ImageShape& shape, const void* x, DataType type, Layout layout,
                           const Threshold& threshold, void* packed, const Queue& queue);

// Does what pack_bits does, and writes to `inside`, in the form of `packed`, the bits of
// |x - threshold| <= limit: there a clipped straight-through estimator (Hubara et al., 2016,
// arXiv:1602.02830) lets a gradient through. The test is threshold - limit <= x <= threshold +
// limit, with both ends rounded to float32. A GPU reads x once. limit: finite, at least 0; else
// kInvalidArgument.
BINCONV_API void pack_bits_and_clip(const ImageShape& shape, const void* x, DataType type,
                                    Layout layout, const Threshold& threshold, float limit,
                                    void* packed, void* inside, const Queue& queue);

// x = +1 or -1 for every bit. `type` is kFloat32, kFloat16, kBFloat16 or kInt8, x dense in
// `layout`.
BINCONV_API void unpack_bits(const ImageShape& shape, const void* packed, void* x, DataType type,
                             Layout layout, const Queue& queue);

}  // namespace binconv
