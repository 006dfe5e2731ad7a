#include "calls.h"

#include <algorithm>
#include <utility>

namespace binconv::python {
namespace {

constexpr auto kInputTypes = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16,
                              DataType::kInt8, DataType::kBits};
constexpr auto kOutTypes = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16,
                            DataType::kInt32, DataType::kBits};

const Array* pointer(const std::optional<Array>& array) { return array ? &*array : nullptr; }

const float* floats(const std::optional<Array>& array) {
  return array ? static_cast<const float*>(array->data) : nullptr;
}

ImageShape image_of(const Array& array, Layout layout) {
  array.expect_rank(4);
  const auto& s = array.shape;
  if (layout == Layout::kNCHW) return {s[0], s[1], s[2], s[3]};
  return {s[0], s[3], s[1], s[2]};
}

ImageShape in_image(const Conv2dShape& shape) {
  return {shape.batch, shape.weight.in_channels, shape.in_height, shape.in_width};
}

ImageShape out_image(const Conv2dShape& shape) {
  return {shape.batch, shape.weight.out_channels, shape.out_height(), shape.out_width()};
}

// A weight as the image of its filters; the shape has been checked.
ImageShape weight_image(const WeightShape& weight) {
  return {weight.out_channels, weight.in_channels / weight.groups, weight.kernel_height,
          weight.kernel_width};
}

std::vector<int64_t> dense_shape(const ImageShape& image, Layout layout) {
  if (layout == Layout::kNCHW) return {image.batch, image.channels, image.height, image.width};
  return {image.batch, image.height, image.width, image.channels};
}

std::vector<int64_t> packed_shape(const ImageShape& image) {
  return {image.batch, image.height, image.width, packed_bytes(image.channels)};
}

// Bits with as many bytes a pixel as the channels need, or more.
void expect_bits(const Array& bits, const ImageShape& image) {
  bits.expect_type(DataType::kBits);
  bits.expect_rank(4);
  const int64_t pixel_bytes = bits.shape[3], least = (image.channels + 7) / 8;
  bits.expect_shape({image.batch, image.height, image.width, std::max(pixel_bytes, least)});
}

void expect_channels(const std::optional<Array>& array, int64_t channels) {
  if (array) array->expect_channels(channels);
}

Threshold threshold_of(const std::optional<Limit>& limit, int64_t channels) {
  if (!limit) return {};
  expect_channels(limit->per_channel, channels);
  return {limit->value, floats(limit->per_channel)};
}

const Array* pointer(const std::optional<Limit>& limit) {
  return limit ? pointer(limit->per_channel) : nullptr;
}

// What says which bits are written is for bits only.
void check_bits(const EpilogueArrays& arrays, DataType out_type, const ImageShape& image) {
  if (arrays.bits) {
    if (out_type == DataType::kBits || out_type == DataType::kInt32) {
      fail("bits: got an array beside an out of ", type_name(out_type),
           ", expected it beside float32, float16 or bfloat16");
    }
    return arrays.bits->expect_packed(packed_shape(image));
  }
  if (out_type == DataType::kBits) return;
  for (const auto& [name, given] : {std::pair{"threshold", arrays.threshold.has_value()},
                                    {"threshold_below", arrays.threshold_below.has_value()}}) {
    if (given) {
      fail(name, ": got one for an out of ", type_name(out_type),
           ", expected it for uint8 or with bits");
    }
  }
}

// The epilogue that writes `out`, once all arrays of the output's sizes have the right form.
Epilogue epilogue_of(const EpilogueArrays& arrays, const Array& out, Layout layout,
                     const ImageShape& image) {
  for (const auto* array :
       {&arrays.scale, &arrays.bias, &arrays.in_shift, &arrays.slope, &arrays.out_shift}) {
    expect_channels(*array, image.channels);
  }
  const Threshold threshold = threshold_of(arrays.threshold, image.channels);
  if (arrays.threshold_below) {
    arrays.threshold_below->expect_type(DataType::kBits);
    arrays.threshold_below->expect_shape({image.channels});
  }
  const bool to_bits = out.type == DataType::kBits;
  if (to_bits) layout = Layout::kNHWC;
  const auto dense = dense_shape(image, layout);
  out.expect_type(kOutTypes);
  if (to_bits) {
    out.expect_packed(packed_shape(image));
  } else {
    out.expect_shape(dense);
  }
  check_bits(arrays, out.type, image);
  Epilogue epilogue{.out_type = out.type, .out_layout = layout, .clamp = arrays.clamp};
  epilogue.scale = floats(arrays.scale);
  epilogue.bias = floats(arrays.bias);
  epilogue.activation = {arrays.activates, floats(arrays.in_shift), floats(arrays.slope),
                         floats(arrays.out_shift)};
  epilogue.threshold = threshold;
  if (arrays.threshold_below) {
    epilogue.threshold_below = static_cast<const uint8_t*>(arrays.threshold_below->data);
  }
  if (arrays.bits) epilogue.bits = arrays.bits->data;
  if (arrays.residual) {
    arrays.residual->expect_type(kFloatTypes);
    arrays.residual->expect_shape(dense);
    epilogue.residual = arrays.residual->data;
    epilogue.residual_type = arrays.residual->type;
  }
  return epilogue;
}

void* memory_of(const Scratch& scratch, int64_t bytes) {
  return bytes > 0 ? scratch(bytes) : nullptr;
}

// Where a signed convolution keeps what only it needs: the prepared weight, and behind it what
// preparing and convolving, one after the other, work with.
struct SignScratch {
  SignScratch(const Conv2dShape& shape, bool has_prepared, const Queue& queue) {
    total = workspace_bytes(shape, queue);  // Also checks the shape.
    if (has_prepared) return;
    const int64_t bytes = prepared_weight_bytes(shape.weight, queue) + kPackedAlignment - 1;
    end = bytes / kPackedAlignment * kPackedAlignment;
    total = end + std::max(total, weight_workspace_bytes(shape.weight, queue));
  }
  int64_t end = 0, total;
};

// A weight and what has its sizes, in the same order.
struct FilterRows {
  explicit FilterRows(const Array& weight) {
    weight.expect_type(kValueTypes);
    weight.expect_rank(4);
    count = weight.shape[0];
    columns = weight.shape[1] * weight.shape[2] * weight.shape[3];
  }
  int64_t count, columns;
};

}  // namespace

void pack_bits(const Array& x, Layout layout, const Limit& threshold, const Array& out,
               const std::optional<Array>& inside, float clip, const Place& place) {
  const ImageShape image = image_of(x, layout);
  x.expect_type(kValueTypes);
  out.expect_packed(packed_shape(image));
  if (inside) inside->expect_packed(packed_shape(image));
  const Threshold limit = threshold_of(threshold, image.channels);
  const Queue queue = queue_for(x, {&out, pointer(inside), pointer(threshold.per_channel)}, place);
  if (inside) {
    pack_bits_and_clip(image, x.data, x.type, layout, limit, clip, out.data, inside->data, queue);
  } else {
    pack_bits(image, x.data, x.type, layout, limit, out.data, queue);
  }
}

void unpack_bits(const Array& packed, const Array& out, Layout layout, const Place& place) {
  const ImageShape image = image_of(out, layout);
  out.expect_type(kValueTypes);
  packed.expect_packed(packed_shape(image));
  const Queue queue = queue_for(packed, {&out}, place);
  unpack_bits(image, packed.data, out.data, out.type, layout, queue);
}

void prepare_weight(const WeightShape& shape, const Array& packed, const Array& out,
                    const Place& place) {
  const Queue queue = queue_for(packed, {&out}, place);
  out.expect_bytes(prepared_weight_bytes(shape, queue));
  packed.expect_packed(packed_shape(weight_image(shape)));
  prepare_weight(shape, packed.data, out.data, queue);
}

void binary_conv2d(const Conv2dShape& shape, const InputArray& input, const Array& prepared_weight,
                   const EpilogueArrays& arrays, const Array& out, Layout layout,
                   const Scratch& scratch, const Place& place) {
  const Array& x = input.array;
  const bool is_packed = x.type == DataType::kBits;
  const Threshold threshold = threshold_of(input.threshold, shape.weight.in_channels);
  if (is_packed && input.threshold) {
    fail("input_threshold: got one for an input of bits, expected None");
  }
  const Queue queue =
      queue_for(x,
                {&prepared_weight, &out, pointer(input.threshold), pointer(arrays.scale),
                 pointer(arrays.bias), pointer(arrays.in_shift), pointer(arrays.slope),
                 pointer(arrays.out_shift), pointer(arrays.threshold),
                 pointer(arrays.threshold_below), pointer(arrays.residual), pointer(arrays.bits)},
                place);
  const int64_t bytes =  // Also checks the shape.
      is_packed ? workspace_bytes(shape, queue) : values_workspace_bytes(shape, queue);
  prepared_weight.expect_bytes(prepared_weight_bytes(shape.weight, queue));
  const ImageShape image = in_image(shape);
  if (is_packed) {
    x.expect_packed(packed_shape(image));
  } else {
    x.expect_type(kInputTypes);
    x.expect_shape(dense_shape(image, input.layout));
  }
  const Epilogue epilogue = epilogue_of(arrays, out, layout, out_image(shape));
  void* const memory = memory_of(scratch, bytes);
  if (is_packed) {
    return binary_conv2d(shape, x.data, prepared_weight.data, epilogue, out.data, memory, queue);
  }
  const Values values = {x.data, x.type, input.layout, threshold};
  binary_conv2d(shape, values, prepared_weight.data, epilogue, out.data, memory, queue);
}

void sign_conv2d(const Conv2dShape& shape, const SignConv2dArrays& arrays, const Scratch& scratch,
                 const Place& place) {
  const auto& [x, weight, bits, out, layout, weight_layout, threshold, inside, clip, scale, bias,
               residual, mean_scale] = arrays;
  const Queue queue =
      queue_for(x,
                {&weight, &bits, &out, pointer(inside), pointer(threshold.per_channel),
                 pointer(scale), pointer(bias), pointer(residual)},
                place);
  const bool has_prepared = weight.type == DataType::kBits;
  const SignScratch at(shape, has_prepared, queue);
  const WeightShape& sizes = shape.weight;
  const ImageShape image = in_image(shape), filters = weight_image(sizes);
  x.expect_type(kValueTypes);
  x.expect_shape(dense_shape(image, layout));
  if (has_prepared) {
    weight.expect_bytes(prepared_weight_bytes(sizes, queue));
  } else {
    weight.expect_type(kValueTypes);
    weight.expect_shape(dense_shape(filters, weight_layout));
  }
  bits.expect_packed(packed_shape(image));
  if (inside) inside->expect_packed(packed_shape(image));
  const Threshold limit = threshold_of(threshold, image.channels);
  const Epilogue epilogue = epilogue_of({.scale = scale, .bias = bias, .residual = residual}, out,
                                        layout, out_image(shape));
  if (mean_scale) weight.expect_type(kFloatTypes);
  if (out.type == DataType::kInt32) {  // Else binary_conv2d checks this, after bits are written.
    for (const auto* factor : {&scale, &bias, &residual}) {
      if (*factor) fail((*factor)->name, ": got one for an out of int32, expected None");
    }
  }

  uint8_t* const memory = static_cast<uint8_t*>(memory_of(scratch, at.total));
  if (inside) {
    pack_bits_and_clip(image, x.data, x.type, layout, limit, clip, bits.data, inside->data, queue);
  } else {
    pack_bits(image, x.data, x.type, layout, limit, bits.data, queue);
  }
  void* const means = mean_scale ? scale->data : nullptr;
  if (!has_prepared) {
    prepare_weight(sizes, weight.data, weight.type, weight_layout, memory,
                   static_cast<float*>(means), memory + at.end, queue);
  }
  const void* const prepared = has_prepared ? weight.data : memory;
  binary_conv2d(shape, bits.data, prepared, epilogue, out.data, memory + at.end, queue);
}

int64_t sign_conv2d_bytes(const Conv2dShape& shape, bool has_prepared, const Queue& queue) {
  return SignScratch(shape, has_prepared, queue).total;
}

void sign_conv2d_operands(const Array& bits, const Array& weight, const Array& signs,
                          const Array& filters, Layout layout, const std::optional<Array>& scale,
                          const Place& place) {
  const ImageShape image = image_of(signs, layout);
  signs.expect_type(kFloatTypes);
  expect_bits(bits, image);
  const FilterRows rows(weight);
  filters.expect_type(kFloatTypes);
  filters.expect_shape(weight.shape);
  expect_channels(scale, rows.count);
  const Queue queue = queue_for(bits, {&weight, &signs, &filters, pointer(scale)}, place);
  sign_values(image, bits.data, bits.shape[3], signs.data, signs.type, layout, queue);
  scaled_signs(rows.count, rows.columns, weight.data, weight.type, floats(scale), filters.data,
               filters.type, queue);
}

void mask_values(const Array& x, const Array& bits, Layout layout, const Place& place) {
  const ImageShape image = image_of(x, layout);
  x.expect_type(kFloatTypes);
  expect_bits(bits, image);
  const Queue queue = queue_for(x, {&bits}, place);
  mask_values(image, bits.data, bits.shape[3], x.data, x.type, layout, queue);
}

void weight_gradient(const Array& gradient, const Array& weight, const Array& out,
                     const std::optional<Array>& scale, float limit, const Place& place) {
  const FilterRows rows(weight);
  for (const Array* array : {&gradient, &out}) {
    array->expect_type(kFloatTypes);
    array->expect_shape(weight.shape);
  }
  expect_channels(scale, rows.count);
  const Queue queue = queue_for(weight, {&gradient, &out, pointer(scale)}, place);
  weight_gradient(rows.count, rows.columns, gradient.data, gradient.type, weight.data, weight.type,
                  floats(scale), limit, out.data, out.type, queue);
}

void abs_mean(const Array& x, const Array& out, const Place& place) {
  x.expect_type(kFloatTypes);
  out.expect_type(DataType::kFloat32);
  out.expect_rank(1);
  int64_t size = 1;
  for (int64_t extent : x.shape) size *= extent;
  const int64_t rows = out.shape[0];
  if (rows != 1 && (x.shape.empty() || rows != x.shape[0])) {
    fail("out: got ", rows, " means, expected 1 or one for each x[i]");
  }
  const Queue queue = queue_for(x, {&out}, place);
  abs_mean(rows, rows ? size / rows : 1, x.data, x.type, static_cast<float*>(out.data), queue);
}

void scale_channels(const Array& x, const Array& scale, const Array& out, Layout layout,
                    const Place& place) {
  const ImageShape image = image_of(x, layout);
  scale.expect_channels(image.channels);
  x.expect_type(kFloatTypes);
  out.expect_type(x.type);
  out.expect_shape(x.shape);
  const Queue queue = queue_for(x, {&out, &scale}, place);
  scale_channels(image, x.data, x.type, layout, static_cast<const float*>(scale.data), out.data,
                 queue);
}

}  // namespace binconv::python
