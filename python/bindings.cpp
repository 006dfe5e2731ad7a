// binconv._binconv: libbinconv on DLPack arrays. Owns no memory and no policy.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"

using namespace nanobind::literals;
using namespace binconv;
using namespace binconv::python;

namespace {

using OptionalStream = std::optional<uintptr_t>;
using OptionalThreads = std::optional<int>;
using OptionalKernel = std::optional<std::string>;

const char* c_str(const OptionalKernel& kernel) { return kernel ? kernel->c_str() : nullptr; }
const Array* pointer(const std::optional<Array>& array) { return array ? &*array : nullptr; }

const float* floats(const std::optional<Array>& array) {
  return array ? static_cast<const float*>(array->data) : nullptr;
}

Layout layout_from(const std::string& layout, const char* name = "layout") {
  if (layout != "nchw" && layout != "nhwc") {
    fail(name, ": got \"", layout, "\", expected \"nchw\" or \"nhwc\"");
  }
  return layout == "nchw" ? Layout::kNCHW : Layout::kNHWC;
}

ImageShape image_of(const Array& array, Layout layout) {
  array.expect_rank(4);
  const auto& s = array.shape;
  if (layout == Layout::kNCHW) return {s[0], s[1], s[2], s[3]};
  return {s[0], s[3], s[1], s[2]};
}

std::vector<int64_t> dense_shape(const ImageShape& image, Layout layout) {
  if (layout == Layout::kNCHW) return {image.batch, image.channels, image.height, image.width};
  return {image.batch, image.height, image.width, image.channels};
}

std::vector<int64_t> packed_shape(const ImageShape& image) {
  return {image.batch, image.height, image.width, packed_bytes(image.channels)};
}

// A weight as the image of its filters; the shape has been checked.
ImageShape weight_image(const WeightShape& weight) {
  return {weight.out_channels, weight.in_channels / weight.groups, weight.kernel_height,
          weight.kernel_width};
}

// A threshold is None, a number, or one number per channel.
struct ThresholdArgument {
  ThresholdArgument(nb::handle object, int64_t channels, const char* name = "threshold") {
    if (object.is_none() || nb::isinstance<nb::capsule>(object) ||
        nb::hasattr(object, "__dlpack__")) {
      array = read_channels(name, object, channels);
      threshold.per_channel = floats(array);
      return;
    }
    const double value = PyFloat_AsDouble(object.ptr());
    if (PyErr_Occurred()) {
      const bool overflows = PyErr_ExceptionMatches(PyExc_OverflowError);
      PyErr_Clear();
      if (overflows) fail(name, ": got an int beyond a float's range, expected a float");
      throw_type_error(name, object, "None, a number or a float32 array");
    }
    threshold.value = static_cast<float>(value);
  }
  Threshold threshold;
  std::optional<Array> array;
};

// An activation is None or its three parts, each None or one number per channel.
struct ActivationArgument {
  ActivationArgument(nb::handle object, int64_t channels) {
    if (object.is_none()) return;
    if (!nb::isinstance<nb::tuple>(object)) {
      throw_type_error("activation", object, "None or a tuple (in_shift, slope, out_shift)");
    }
    const nb::tuple parts = nb::borrow<nb::tuple>(object);
    if (parts.size() != 3) {
      fail("activation: got ", parts.size(), " parts, expected (in_shift, slope, out_shift)");
    }
    in_shift = read_channels("in_shift", parts[0], channels);
    slope = read_channels("slope", parts[1], channels);
    out_shift = read_channels("out_shift", parts[2], channels);
    activation = {true, floats(in_shift), floats(slope), floats(out_shift)};
  }
  Activation activation;
  std::optional<Array> in_shift, slope, out_shift;
};

constexpr auto kFloatTypes = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16};
constexpr auto kValueTypes = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16,
                              DataType::kInt8};
constexpr auto kInputTypes = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16,
                              DataType::kInt8, DataType::kBits};
constexpr auto kOutTypes = {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16,
                            DataType::kInt32, DataType::kBits};

void pack(nb::handle x_object, nb::handle out_object, const std::string& layout_name,
          nb::handle threshold_object, OptionalStream stream, OptionalThreads threads) {
  const Array x = read("x", x_object), out = write("out", out_object);
  const Layout layout = layout_from(layout_name);
  const ImageShape image = image_of(x, layout);
  x.expect_type(kValueTypes);
  out.expect_packed(packed_shape(image));
  const ThresholdArgument threshold(threshold_object, image.channels);
  const Queue queue = queue_for(x, {&out, pointer(threshold.array)}, stream, threads);
  nb::gil_scoped_release unlocked;
  pack_bits(image, x.data, x.type, layout, threshold.threshold, out.data, queue);
}

void pack_and_clip(nb::handle x_object, nb::handle out_object, nb::handle inside_object,
                   const std::string& layout_name, nb::handle threshold_object, float limit,
                   OptionalStream stream, OptionalThreads threads) {
  const Array x = read("x", x_object), out = write("out", out_object);
  const Array inside = write("inside", inside_object);
  const Layout layout = layout_from(layout_name);
  const ImageShape image = image_of(x, layout);
  x.expect_type(kValueTypes);
  out.expect_packed(packed_shape(image));
  inside.expect_packed(packed_shape(image));
  const ThresholdArgument threshold(threshold_object, image.channels);
  const Queue queue = queue_for(x, {&out, &inside, pointer(threshold.array)}, stream, threads);
  nb::gil_scoped_release unlocked;
  pack_bits_and_clip(image, x.data, x.type, layout, threshold.threshold, limit, out.data,
                     inside.data, queue);
}

void unpack(nb::handle packed_object, nb::handle out_object, const std::string& layout_name,
            OptionalStream stream, OptionalThreads threads) {
  const Array packed = read("packed", packed_object), out = write("out", out_object);
  const Layout layout = layout_from(layout_name);
  const ImageShape image = image_of(out, layout);
  out.expect_type(kValueTypes);
  packed.expect_packed(packed_shape(image));
  const Queue queue = queue_for(packed, {&out}, stream, threads);
  nb::gil_scoped_release unlocked;
  unpack_bits(image, packed.data, out.data, out.type, layout, queue);
}

void prepare(const WeightShape& shape, nb::handle packed_object, nb::handle out_object,
             OptionalStream stream, OptionalThreads threads, const OptionalKernel& kernel) {
  const Array packed = read("packed", packed_object), out = write("out", out_object);
  const Queue queue = queue_for(packed, {&out}, stream, threads, c_str(kernel));
  out.expect_bytes(prepared_weight_bytes(shape, queue));
  packed.expect_packed(packed_shape(weight_image(shape)));
  nb::gil_scoped_release unlocked;
  prepare_weight(shape, packed.data, out.data, queue);
}

// The options of a convolution's epilogue, as Python gives them.
struct EpilogueObjects {
  bool clamp, writes_scale;
  nb::handle scale, bias, residual, activation, threshold, threshold_below, bits;
};

struct EpilogueArguments {
  EpilogueArguments(int64_t channels, const EpilogueObjects& objects)
      : clamp(objects.clamp),
        scale(objects.writes_scale ? write_channels("scale", objects.scale, channels)
                                   : read_channels("scale", objects.scale, channels)),
        bias(read_channels("bias", objects.bias, channels)),
        residual(read_optional("residual", objects.residual)),
        activation(objects.activation, channels),
        threshold(objects.threshold, channels),
        has_threshold(!objects.threshold.is_none()),
        threshold_below(read_flags("threshold_below", objects.threshold_below, channels)) {
    if (!objects.bits.is_none()) bits = write("bits", objects.bits);
  }

  // The epilogue that writes `out`, once all arrays of the output's sizes have the right form.
  Epilogue to(const Array& out, Layout layout, const ImageShape& image) const {
    const bool to_bits = out.type == DataType::kBits;
    if (to_bits) layout = Layout::kNHWC;
    const auto dense = dense_shape(image, layout);
    out.expect_type(kOutTypes);
    if (to_bits) {
      out.expect_packed(packed_shape(image));
    } else {
      out.expect_shape(dense);
    }
    check_bits(out.type, image);
    Epilogue epilogue{.out_type = out.type, .out_layout = layout, .clamp = clamp};
    epilogue.scale = floats(scale);
    epilogue.bias = floats(bias);
    epilogue.activation = activation.activation;
    epilogue.threshold = threshold.threshold;
    if (threshold_below) {
      epilogue.threshold_below = static_cast<const uint8_t*>(threshold_below->data);
    }
    if (bits) epilogue.bits = bits->data;
    if (residual) {
      residual->expect_type(kFloatTypes);
      residual->expect_shape(dense);
      epilogue.residual = residual->data;
      epilogue.residual_type = residual->type;
    }
    return epilogue;
  }

  bool clamp;
  std::optional<Array> scale, bias, residual;
  ActivationArgument activation;
  ThresholdArgument threshold;
  bool has_threshold;
  std::optional<Array> threshold_below, bits;

 private:
  void check_bits(DataType out_type, const ImageShape& image) const {
    if (bits) {
      if (out_type == DataType::kBits || out_type == DataType::kInt32) {
        fail("bits: got an array beside an out of ", type_name(out_type),
             ", expected it beside float32, float16 or bfloat16");
      }
      return bits->expect_packed(packed_shape(image));
    }
    if (out_type == DataType::kBits) return;
    for (const auto& [name, given] : {std::pair{"threshold", has_threshold},
                                      {"threshold_below", threshold_below.has_value()}}) {
      if (given) {
        fail(name, ": got one for an out of ", type_name(out_type),
             ", expected it for uint8 or with bits");
      }
    }
  }
};

void conv2d(const Conv2dShape& shape, nb::handle input_object, nb::handle prepared_object,
            nb::handle out_object, const std::string& layout_name, bool clamp,
            nb::handle scale_object, nb::handle bias_object, nb::handle residual_object,
            nb::handle activation_object, nb::handle threshold_object,
            nb::handle threshold_below_object, nb::handle bits_object, nb::handle workspace_object,
            const std::string& input_layout_name, nb::handle input_threshold_object,
            OptionalStream stream, OptionalThreads threads, const OptionalKernel& kernel) {
  const WeightShape& weight = shape.weight;
  const Array input = read("input", input_object), out = write("out", out_object);
  const Array prepared = read("prepared_weight", prepared_object);
  const EpilogueArguments arguments(
      weight.out_channels,
      {clamp, false, scale_object, bias_object, residual_object, activation_object,
       threshold_object, threshold_below_object, bits_object});
  const bool is_packed = input.type == DataType::kBits;
  const ThresholdArgument input_threshold(input_threshold_object, weight.in_channels,
                                          "input_threshold");
  if (is_packed && !input_threshold_object.is_none()) {
    fail("input_threshold: got one for an input of bits, expected None");
  }
  std::optional<Array> workspace;
  if (!workspace_object.is_none()) workspace = write("workspace", workspace_object);
  const Queue queue =
      queue_for(input,
                {&prepared, &out, pointer(input_threshold.array), pointer(arguments.scale),
                 pointer(arguments.bias), pointer(arguments.activation.in_shift),
                 pointer(arguments.activation.slope), pointer(arguments.activation.out_shift),
                 pointer(arguments.threshold.array), pointer(arguments.threshold_below),
                 pointer(arguments.residual), pointer(arguments.bits), pointer(workspace)},
                stream, threads, c_str(kernel));

  const int64_t scratch =  // Also checks the shape.
      is_packed ? workspace_bytes(shape, queue) : values_workspace_bytes(shape, queue);
  prepared.expect_bytes(prepared_weight_bytes(weight, queue));
  const ImageShape image = {shape.batch, weight.in_channels, shape.in_height, shape.in_width};
  const Layout input_layout = layout_from(input_layout_name, "input_layout");
  if (is_packed) {
    input.expect_packed(packed_shape(image));
  } else {
    input.expect_type(kInputTypes);
    input.expect_shape(dense_shape(image, input_layout));
  }
  if (workspace) {
    workspace->expect_bytes(scratch);
  } else if (scratch > 0) {
    fail("workspace: got None, expected a uint8 array of workspace_bytes(...) = ", scratch);
  }
  const Epilogue epilogue =
      arguments.to(out, layout_from(layout_name),
                   {shape.batch, weight.out_channels, shape.out_height(), shape.out_width()});
  void* const memory = workspace ? workspace->data : nullptr;
  nb::gil_scoped_release unlocked;
  if (is_packed) {
    return binary_conv2d(shape, input.data, prepared.data, epilogue, out.data, memory, queue);
  }
  const Values values = {input.data, input.type, input_layout, input_threshold.threshold};
  binary_conv2d(shape, values, prepared.data, epilogue, out.data, memory, queue);
}

// Where a signed convolution keeps what only it needs: the weight's bits, prepared, and what
// binary_conv2d works with. All sizes are multiples of the alignment but the last.
struct SignScratch {
  SignScratch(const Conv2dShape& shape, bool has_prepared, const Queue& queue) {
    const WeightShape& weight = shape.weight;
    const int64_t workspace = workspace_bytes(shape, queue);  // Also checks the shape.
    if (!has_prepared) {
      prepared = packed_image_bytes(weight_image(weight));
      const int64_t bytes = prepared_weight_bytes(weight, queue) + kPackedAlignment - 1;
      end = prepared + bytes / kPackedAlignment * kPackedAlignment;
    }
    total = end + workspace;
  }
  int64_t prepared = 0, end = 0, total;  // Where each starts.
};

void sign_conv2d(const Conv2dShape& shape, nb::handle x_object, nb::handle weight_object,
                 nb::handle bits_object, nb::handle out_object, nb::handle scratch_object,
                 const std::string& layout_name, const std::string& weight_layout_name,
                 nb::handle threshold_object, nb::handle inside_object, float limit,
                 nb::handle scale_object, bool mean_scale, nb::handle bias_object,
                 nb::handle residual_object, OptionalStream stream, OptionalThreads threads) {
  const WeightShape& sizes = shape.weight;
  const Array x = read("x", x_object), weight = read("weight", weight_object);
  const Array bits = write("bits", bits_object), out = write("out", out_object);
  const Array scratch = write("scratch", scratch_object);
  std::optional<Array> inside;
  if (!inside_object.is_none()) inside = write("inside", inside_object);
  const ThresholdArgument threshold(threshold_object, sizes.in_channels);
  const EpilogueArguments arguments(sizes.out_channels, {.clamp = false,
                                                         .writes_scale = mean_scale,
                                                         .scale = scale_object,
                                                         .bias = bias_object,
                                                         .residual = residual_object,
                                                         .activation = nb::none(),
                                                         .threshold = nb::none(),
                                                         .threshold_below = nb::none(),
                                                         .bits = nb::none()});
  const Queue queue =
      queue_for(x,
                {&weight, &bits, &out, &scratch, pointer(inside), pointer(threshold.array),
                 pointer(arguments.scale), pointer(arguments.bias), pointer(arguments.residual)},
                stream, threads);

  const bool has_prepared = weight.type == DataType::kBits;
  const SignScratch at(shape, has_prepared, queue);
  const Layout layout = layout_from(layout_name), weight_layout = layout_from(weight_layout_name);
  const ImageShape image = {shape.batch, sizes.in_channels, shape.in_height, shape.in_width};
  const ImageShape filters = weight_image(sizes);
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
  scratch.expect_bytes(at.total);
  const Epilogue epilogue = arguments.to(
      out, layout, {shape.batch, sizes.out_channels, shape.out_height(), shape.out_width()});
  if (mean_scale) weight.expect_type(kFloatTypes);
  if (out.type == DataType::kInt32) {  // Else binary_conv2d checks this, after bits are written.
    for (const auto* factor : {&arguments.scale, &arguments.bias, &arguments.residual}) {
      if (*factor) fail((*factor)->name, ": got one for an out of int32, expected None");
    }
  }

  nb::gil_scoped_release unlocked;
  if (mean_scale) {
    const int64_t columns = filters.channels * filters.height * filters.width;
    abs_mean(filters.batch, columns, weight.data, weight.type,
             static_cast<float*>(arguments.scale->data), queue);
  }
  if (inside) {
    pack_bits_and_clip(image, x.data, x.type, layout, threshold.threshold, limit, bits.data,
                       inside->data, queue);
  } else {
    pack_bits(image, x.data, x.type, layout, threshold.threshold, bits.data, queue);
  }
  uint8_t* const memory = static_cast<uint8_t*>(scratch.data);
  const void* prepared = weight.data;
  if (!has_prepared) {
    pack_bits(filters, weight.data, weight.type, weight_layout, {}, memory, queue);
    prepare_weight(sizes, memory, memory + at.prepared, queue);
    prepared = memory + at.prepared;
  }
  binary_conv2d(shape, bits.data, prepared, epilogue, out.data, memory + at.end, queue);
}

// Bits with as many bytes a pixel as the channels need, or more.
void expect_bits(const Array& bits, const ImageShape& image) {
  bits.expect_type(DataType::kBits);
  bits.expect_rank(4);
  const int64_t pixel_bytes = bits.shape[3], least = (image.channels + 7) / 8;
  bits.expect_shape({image.batch, image.height, image.width, std::max(pixel_bytes, least)});
}

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

void sign_conv2d_operands(nb::handle bits_object, nb::handle weight_object, nb::handle signs_object,
                          nb::handle filters_object, const std::string& layout_name,
                          nb::handle scale_object, OptionalStream stream, OptionalThreads threads) {
  const Array bits = read("bits", bits_object), weight = read("weight", weight_object);
  const Array signs = write("signs", signs_object), filters = write("filters", filters_object);
  const Layout layout = layout_from(layout_name);
  const ImageShape image = image_of(signs, layout);
  signs.expect_type(kFloatTypes);
  expect_bits(bits, image);
  const FilterRows rows(weight);
  filters.expect_type(kFloatTypes);
  filters.expect_shape(weight.shape);
  const auto scale = read_channels("scale", scale_object, rows.count);
  const Queue queue = queue_for(bits, {&weight, &signs, &filters, pointer(scale)}, stream, threads);
  nb::gil_scoped_release unlocked;
  sign_values(image, bits.data, bits.shape[3], signs.data, signs.type, layout, queue);
  scaled_signs(rows.count, rows.columns, weight.data, weight.type, floats(scale), filters.data,
               filters.type, queue);
}

void mask(nb::handle x_object, nb::handle bits_object, const std::string& layout_name,
          OptionalStream stream, OptionalThreads threads) {
  const Array x = write("x", x_object), bits = read("bits", bits_object);
  const Layout layout = layout_from(layout_name);
  const ImageShape image = image_of(x, layout);
  x.expect_type(kFloatTypes);
  expect_bits(bits, image);
  const Queue queue = queue_for(x, {&bits}, stream, threads);
  nb::gil_scoped_release unlocked;
  mask_values(image, bits.data, bits.shape[3], x.data, x.type, layout, queue);
}

void gradient_of_weight(nb::handle gradient_object, nb::handle weight_object, nb::handle out_object,
                        nb::handle scale_object, float limit, OptionalStream stream,
                        OptionalThreads threads) {
  const Array gradient = read("gradient", gradient_object), weight = read("weight", weight_object);
  const Array out = write("out", out_object);
  const FilterRows rows(weight);
  for (const Array* array : {&gradient, &out}) {
    array->expect_type(kFloatTypes);
    array->expect_shape(weight.shape);
  }
  const auto scale = read_channels("scale", scale_object, rows.count);
  const Queue queue = queue_for(weight, {&gradient, &out, pointer(scale)}, stream, threads);
  nb::gil_scoped_release unlocked;
  weight_gradient(rows.count, rows.columns, gradient.data, gradient.type, weight.data, weight.type,
                  floats(scale), limit, out.data, out.type, queue);
}

void mean(nb::handle x_object, nb::handle out_object, OptionalStream stream,
          OptionalThreads threads) {
  const Array x = read("x", x_object), out = write("out", out_object);
  x.expect_type(kFloatTypes);
  out.expect_type(DataType::kFloat32);
  out.expect_rank(1);
  int64_t size = 1;
  for (int64_t extent : x.shape) size *= extent;
  const int64_t rows = out.shape[0];
  if (rows != 1 && (x.shape.empty() || rows != x.shape[0])) {
    fail("out: got ", rows, " means, expected 1 or one for each x[i]");
  }
  const Queue queue = queue_for(x, {&out}, stream, threads);
  nb::gil_scoped_release unlocked;
  abs_mean(rows, rows ? size / rows : 1, x.data, x.type, static_cast<float*>(out.data), queue);
}

void scale(nb::handle x_object, nb::handle scale_object, nb::handle out_object,
           const std::string& layout_name, OptionalStream stream, OptionalThreads threads) {
  const Array x = read("x", x_object), out = write("out", out_object);
  const Layout layout = layout_from(layout_name);
  const ImageShape image = image_of(x, layout);
  const Array factors = read("scale", scale_object);
  factors.expect_channels(image.channels);
  x.expect_type(kFloatTypes);
  out.expect_type(x.type);
  out.expect_shape(x.shape);
  const Queue queue = queue_for(x, {&out, &factors}, stream, threads);
  nb::gil_scoped_release unlocked;
  scale_channels(image, x.data, x.type, layout, static_cast<const float*>(factors.data), out.data,
                 queue);
}

void translate(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const Error& error) {
    PyObject* type = error.status() == Status::kInvalidArgument ? PyExc_ValueError
                     : error.status() == Status::kNotSupported  ? PyExc_NotImplementedError
                                                                : PyExc_RuntimeError;
    PyErr_SetString(type, error.what());
  }
}

void bind_shapes(nb::module_& m) {
  nb::class_<WeightShape>(m, "WeightShape", "Sizes of a weight tensor.")
      .def(
          "__init__",
          [](WeightShape* self, int64_t out_channels, int64_t in_channels, int64_t kernel_height,
             int64_t kernel_width, int64_t groups) {
            new (self) WeightShape{out_channels, in_channels, kernel_height, kernel_width, groups};
          },
          "out_channels"_a, "in_channels"_a, "kernel_height"_a, "kernel_width"_a, "groups"_a = 1)
      .def_rw("out_channels", &WeightShape::out_channels)
      .def_rw("in_channels", &WeightShape::in_channels)
      .def_rw("kernel_height", &WeightShape::kernel_height)
      .def_rw("kernel_width", &WeightShape::kernel_width)
      .def_rw("groups", &WeightShape::groups);
  using Pair = std::pair<int64_t, int64_t>;
  using Quad = std::tuple<int64_t, int64_t, int64_t, int64_t>;
  nb::class_<Conv2dShape>(m, "Conv2dShape",
                          "All sizes of a convolution; padding is (top, left, bottom, right).")
      .def(
          "__init__",
          [](Conv2dShape* self, int64_t batch, int64_t in_height, int64_t in_width,
             const WeightShape& weight, Pair stride, Quad padding, Pair dilation, int pad_value) {
            const auto [top, left, bottom, right] = padding;
            new (self) Conv2dShape{
                batch, in_height, in_width, weight,         stride.first,    stride.second, top,
                left,  bottom,    right,    dilation.first, dilation.second, pad_value};
          },
          "batch"_a, "in_height"_a, "in_width"_a, "weight"_a, nb::kw_only(),
          "stride"_a = Pair{1, 1}, "padding"_a = Quad{0, 0, 0, 0}, "dilation"_a = Pair{1, 1},
          "pad_value"_a = 0)
      .def_ro("batch", &Conv2dShape::batch)
      .def_ro("in_height", &Conv2dShape::in_height)
      .def_ro("in_width", &Conv2dShape::in_width)
      .def_ro("weight", &Conv2dShape::weight)
      .def_prop_ro("stride",
                   [](const Conv2dShape& s) { return Pair{s.stride_height, s.stride_width}; })
      .def_prop_ro("padding",
                   [](const Conv2dShape& s) {
                     return Quad{s.pad_top, s.pad_left, s.pad_bottom, s.pad_right};
                   })
      .def_prop_ro("dilation",
                   [](const Conv2dShape& s) { return Pair{s.dilation_height, s.dilation_width}; })
      .def_ro("pad_value", &Conv2dShape::pad_value)
      .def_prop_ro("out_height", &Conv2dShape::out_height)
      .def_prop_ro("out_width", &Conv2dShape::out_width);
}

void bind_queries(nb::module_& m) {
  m.def("packed_bytes", &packed_bytes, "channels"_a,
        "Bytes of one packed pixel: 16 * ceil(channels / 128).");
  m.def(
      "prepared_weight_bytes",
      [](const WeightShape& shape, std::optional<int> device, const OptionalKernel& kernel) {
        return prepared_weight_bytes(shape, queue_for(Device{device}, {}, c_str(kernel)));
      },
      "shape"_a, nb::kw_only(), "device"_a = nb::none(), "kernel"_a = nb::none(),
      "Bytes of prepared weights on the CPU (device None) or on the CUDA device of that ordinal.");
  m.def(
      "workspace_bytes",
      [](const Conv2dShape& shape, bool values, std::optional<int> device, OptionalThreads threads,
         const OptionalKernel& kernel) {
        const Queue queue = queue_for(Device{device}, threads, c_str(kernel));
        return values ? values_workspace_bytes(shape, queue) : workspace_bytes(shape, queue);
      },
      "shape"_a, nb::kw_only(), "values"_a = false, "device"_a = nb::none(),
      "threads"_a = nb::none(), "kernel"_a = nb::none(),
      "Bytes of scratch memory for binary_conv2d with the same threads and kernel.");
  m.def(
      "sign_conv2d_bytes",
      [](const Conv2dShape& shape, bool prepared, std::optional<int> device,
         OptionalThreads threads) {
        return SignScratch(shape, prepared, queue_for(Device{device}, threads)).total;
      },
      "shape"_a, nb::kw_only(), "prepared"_a = false, "device"_a = nb::none(),
      "threads"_a = nb::none(), "Bytes of scratch memory for sign_conv2d with the same threads.");
  m.def(
      "kernel_name",
      [](const Conv2dShape& shape, std::optional<int> device, const OptionalKernel& kernel) {
        return std::string(kernel_name(shape, queue_for(Device{device}, {}, c_str(kernel))));
      },
      "shape"_a, nb::kw_only(), "device"_a = nb::none(), "kernel"_a = nb::none(),
      "The kernel that binary_conv2d runs for this shape, such as \"cpu_avx2\".");
  m.def(
      "available_kernels",
      [](std::optional<int> device) { return available_kernels(queue_for(Device{device}, {})); },
      "device"_a = nb::none(), "Names of the kernels that can run on a device, best first.");
  m.def("version", &version, "The version of libbinconv.");
  m.def("cuda_architectures", &cuda_architectures,
        "GPU architectures with compiled code; \"\" in a CPU-only build.");
  m.def(
      "cuda_devices",
      [] {
        std::vector<std::pair<std::string, int>> devices;
        for (const CudaDevice& device : cuda_devices())
          devices.emplace_back(device.name, device.compute_capability);
        return devices;
      },
      "(name, compute capability such as 90) of each CUDA device.");
}

}  // namespace

NB_MODULE(_binconv, m) {
  nb::register_exception_translator(translate);
  bind_shapes(m);
  bind_queries(m);
  m.def("pack_bits", pack, "x"_a.none(), "out"_a.none(), nb::kw_only(), "layout"_a = "nchw",
        "threshold"_a = nb::none(), "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("pack_bits_and_clip", pack_and_clip, "x"_a.none(), "out"_a.none(), "inside"_a.none(),
        nb::kw_only(), "layout"_a = "nchw", "threshold"_a = nb::none(), "limit"_a = 1.0f,
        "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("unpack_bits", unpack, "packed"_a.none(), "out"_a.none(), nb::kw_only(),
        "layout"_a = "nchw", "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("prepare_weight", prepare, "shape"_a, "packed"_a.none(), "out"_a.none(), nb::kw_only(),
        "stream"_a = nb::none(), "threads"_a = nb::none(), "kernel"_a = nb::none());
  m.def("binary_conv2d", conv2d, "shape"_a, "input"_a.none(), "prepared_weight"_a.none(),
        "out"_a.none(), nb::kw_only(), "layout"_a = "nhwc", "clamp"_a = false,
        "scale"_a = nb::none(), "bias"_a = nb::none(), "residual"_a = nb::none(),
        "activation"_a = nb::none(), "threshold"_a = nb::none(), "threshold_below"_a = nb::none(),
        "bits"_a = nb::none(), "workspace"_a = nb::none(), "input_layout"_a = "nhwc",
        "input_threshold"_a = nb::none(), "stream"_a = nb::none(), "threads"_a = nb::none(),
        "kernel"_a = nb::none());
  m.def("sign_conv2d", sign_conv2d, "shape"_a, "x"_a.none(), "weight"_a.none(), "bits"_a.none(),
        "out"_a.none(), "scratch"_a.none(), nb::kw_only(), "layout"_a = "nchw",
        "weight_layout"_a = "nchw", "threshold"_a = nb::none(), "inside"_a = nb::none(),
        "limit"_a = 1.0f, "scale"_a = nb::none(), "mean_scale"_a = false, "bias"_a = nb::none(),
        "residual"_a = nb::none(), "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("sign_conv2d_operands", sign_conv2d_operands, "bits"_a.none(), "weight"_a.none(),
        "signs"_a.none(), "filters"_a.none(), nb::kw_only(), "layout"_a = "nchw",
        "scale"_a = nb::none(), "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("mask_values", mask, "x"_a.none(), "bits"_a.none(), nb::kw_only(), "layout"_a = "nchw",
        "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("weight_gradient", gradient_of_weight, "gradient"_a.none(), "weight"_a.none(),
        "out"_a.none(), nb::kw_only(), "scale"_a = nb::none(), "limit"_a = 1.0f,
        "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("abs_mean", mean, "x"_a.none(), "out"_a.none(), nb::kw_only(), "stream"_a = nb::none(),
        "threads"_a = nb::none());
  m.def("scale_channels", scale, "x"_a.none(), "scale"_a.none(), "out"_a.none(), nb::kw_only(),
        "layout"_a = "nchw", "stream"_a = nb::none(), "threads"_a = nb::none());
}
