#pragma once

// The library's functions on arrays, for DLPack (bindings.cpp) and for PyTorch (operators.cpp).
// Sizes, types and devices are checked here, before anything is launched. Where an image is an
// array, its sizes are in the order of its layout.

#include <functional>
#include <optional>

#include "arrays.h"

namespace binconv::python {

// A threshold: a number, or one for each channel.
struct Limit {
  float value = 0.0f;
  std::optional<Array> per_channel;  // float32 (channels,).
};

// What follows the accumulator. Arrays of one value for each output channel are float32, flags are
// uint8; residual and out are in the layout of the call.
struct EpilogueArrays {
  bool clamp = false;
  std::optional<Array> scale, bias, residual;
  bool activates = false;
  std::optional<Array> in_shift, slope, out_shift;
  std::optional<Limit> threshold;
  std::optional<Array> threshold_below, bits;
};

// Values, or bits, which have neither a layout nor a threshold.
struct InputArray {
  Array array;
  Layout layout = Layout::kNHWC;
  std::optional<Limit> threshold;
};

// Gives at least so many bytes of memory, aligned to 16; not called for none.
using Scratch = std::function<void*(int64_t bytes)>;

// Bits of x >= threshold, and with `inside` also those of |x - threshold| <= clip.
void pack_bits(const Array& x, Layout layout, const Limit& threshold, const Array& out,
               const std::optional<Array>& inside, float clip, const Place& place);
void unpack_bits(const Array& packed, const Array& out, Layout layout, const Place& place);

void prepare_weight(const WeightShape& shape, const Array& packed, const Array& out,
                    const Place& place);

void binary_conv2d(const Conv2dShape& shape, const InputArray& input, const Array& prepared_weight,
                   const EpilogueArrays& epilogue, const Array& out, Layout layout,
                   const Scratch& scratch, const Place& place);

// A convolution of values that are packed on the way, as training needs it.
struct SignConv2dArrays {
  Array x, weight, bits, out;  // The weight is values or prepared; the bits of x are kept.
  Layout layout, weight_layout;
  Limit threshold;
  std::optional<Array> inside;  // Takes the bits of |x - threshold| <= clip.
  float clip = 0.0f;
  std::optional<Array> scale, bias, residual;
  bool mean_scale = false;  // Writes mean(|weight|) of each filter to scale first.
};

void sign_conv2d(const Conv2dShape& shape, const SignConv2dArrays& arrays, const Scratch& scratch,
                 const Place& place);
int64_t sign_conv2d_bytes(const Conv2dShape& shape, bool has_prepared, const Queue& queue);

// What the convolutions of backward take: signs of an image, and scale * sign(weight).
void sign_conv2d_operands(const Array& bits, const Array& weight, const Array& signs,
                          const Array& filters, Layout layout, const std::optional<Array>& scale,
                          const Place& place);

// Sets values to 0 where bits are 0.
void mask_values(const Array& x, const Array& bits, Layout layout, const Place& place);

void weight_gradient(const Array& gradient, const Array& weight, const Array& out,
                     const std::optional<Array>& scale, float limit, const Place& place);

// Of all of x for one mean, else of each x[i].
void abs_mean(const Array& x, const Array& out, const Place& place);
void scale_channels(const Array& x, const Array& scale, const Array& out, Layout layout,
                    const Place& place);

}  // namespace binconv::python
