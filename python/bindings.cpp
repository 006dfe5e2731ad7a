// binconv._binconv: libbinconv on DLPack arrays. Owns no memory and no policy.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "calls.h"
#include "operators.h"

using namespace nanobind::literals;
using namespace binconv;
using namespace binconv::python;

namespace {

using OptionalStream = std::optional<uintptr_t>;
using OptionalThreads = std::optional<int>;
using OptionalKernel = std::optional<std::string>;

const char* c_str(const OptionalKernel& kernel) { return kernel ? kernel->c_str() : nullptr; }

Layout layout_from(const std::string& layout, const char* name = "layout") {
  if (layout != "nchw" && layout != "nhwc") {
    fail(name, ": got \"", layout, "\", expected \"nchw\" or \"nhwc\"");
  }
  return layout == "nchw" ? Layout::kNCHW : Layout::kNHWC;
}

// A threshold is None, a number, or one number per channel.
std::optional<Limit> limit_from(nb::handle object, const char* name = "threshold") {
  if (object.is_none()) return std::nullopt;
  if (nb::isinstance<nb::capsule>(object) || nb::hasattr(object, "__dlpack__")) {
    return Limit{0.0f, read(name, object)};
  }
  const double value = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred()) {
    const bool overflows = PyErr_ExceptionMatches(PyExc_OverflowError);
    PyErr_Clear();
    if (overflows) fail(name, ": got an int beyond a float's range, expected a float");
    throw_type_error(name, object, "None, a number or a float32 array");
  }
  return Limit{static_cast<float>(value), {}};
}

// An activation is None or its three parts, each None or one number per channel.
void read_activation(nb::handle object, EpilogueArrays& epilogue) {
  if (object.is_none()) return;
  if (!nb::isinstance<nb::tuple>(object)) {
    throw_type_error("activation", object, "None or a tuple (in_shift, slope, out_shift)");
  }
  const nb::tuple parts = nb::borrow<nb::tuple>(object);
  if (parts.size() != 3) {
    fail("activation: got ", parts.size(), " parts, expected (in_shift, slope, out_shift)");
  }
  epilogue.activates = true;
  epilogue.in_shift = read_optional("in_shift", parts[0]);
  epilogue.slope = read_optional("slope", parts[1]);
  epilogue.out_shift = read_optional("out_shift", parts[2]);
}

// Memory that the caller brought, for arrays on this device.
Scratch scratch_from(const std::optional<Array>& workspace, const Device& device) {
  return [&workspace, device](int64_t bytes) {
    if (!workspace) {
      fail("workspace: got None, expected a uint8 array of workspace_bytes(...) = ", bytes);
    }
    if (!(workspace->device == device)) {
      fail(workspace->name, ": got an array on ", workspace->device.str(), ", expected ",
           device.str());
    }
    workspace->expect_bytes(bytes);
    return workspace->data;
  };
}

void pack(nb::handle x_object, nb::handle out_object, const std::string& layout,
          nb::handle threshold_object, OptionalStream stream, OptionalThreads threads) {
  const Array x = read("x", x_object), out = write("out", out_object);
  const Limit threshold = limit_from(threshold_object).value_or(Limit{});
  nb::gil_scoped_release unlocked;
  pack_bits(x, layout_from(layout), threshold, out, {}, 0.0f, {stream, threads});
}

void pack_and_clip(nb::handle x_object, nb::handle out_object, nb::handle inside_object,
                   const std::string& layout, nb::handle threshold_object, float limit,
                   OptionalStream stream, OptionalThreads threads) {
  const Array x = read("x", x_object), out = write("out", out_object);
  const Array inside = write("inside", inside_object);
  const Limit threshold = limit_from(threshold_object).value_or(Limit{});
  nb::gil_scoped_release unlocked;
  pack_bits(x, layout_from(layout), threshold, out, inside, limit, {stream, threads});
}

void unpack(nb::handle packed_object, nb::handle out_object, const std::string& layout,
            OptionalStream stream, OptionalThreads threads) {
  const Array packed = read("packed", packed_object), out = write("out", out_object);
  nb::gil_scoped_release unlocked;
  unpack_bits(packed, out, layout_from(layout), {stream, threads});
}

void prepare(const WeightShape& shape, nb::handle packed_object, nb::handle out_object,
             OptionalStream stream, OptionalThreads threads, const OptionalKernel& kernel) {
  const Array packed = read("packed", packed_object), out = write("out", out_object);
  nb::gil_scoped_release unlocked;
  prepare_weight(shape, packed, out, {stream, threads, c_str(kernel)});
}

void conv2d(const Conv2dShape& shape, nb::handle input_object, nb::handle prepared_object,
            nb::handle out_object, const std::string& layout, bool clamp, nb::handle scale_object,
            nb::handle bias_object, nb::handle residual_object, nb::handle activation_object,
            nb::handle threshold_object, nb::handle threshold_below_object, nb::handle bits_object,
            nb::handle workspace_object, const std::string& input_layout,
            nb::handle input_threshold_object, OptionalStream stream, OptionalThreads threads,
            const OptionalKernel& kernel) {
  const InputArray input = {read("input", input_object), layout_from(input_layout, "input_layout"),
                            limit_from(input_threshold_object, "input_threshold")};
  const Array out = write("out", out_object);
  const Array prepared = read("prepared_weight", prepared_object);
  EpilogueArrays epilogue = {
      .clamp = clamp,
      .scale = read_optional("scale", scale_object),
      .bias = read_optional("bias", bias_object),
      .residual = read_optional("residual", residual_object),
      .threshold = limit_from(threshold_object),
      .threshold_below = read_flags("threshold_below", threshold_below_object),
      .bits = write_optional("bits", bits_object)};
  read_activation(activation_object, epilogue);
  const auto workspace = write_optional("workspace", workspace_object);
  nb::gil_scoped_release unlocked;
  binary_conv2d(shape, input, prepared, epilogue, out, layout_from(layout),
                scratch_from(workspace, input.array.device), {stream, threads, c_str(kernel)});
}

void convolve_signs(const Conv2dShape& shape, nb::handle x_object, nb::handle weight_object,
                    nb::handle bits_object, nb::handle out_object, nb::handle scratch_object,
                    const std::string& layout, const std::string& weight_layout,
                    nb::handle threshold_object, nb::handle inside_object, float limit,
                    nb::handle scale_object, bool mean_scale, nb::handle bias_object,
                    nb::handle residual_object, OptionalStream stream, OptionalThreads threads) {
  const SignConv2dArrays arrays = {
      .x = read("x", x_object),
      .weight = read("weight", weight_object),
      .bits = write("bits", bits_object),
      .out = write("out", out_object),
      .layout = layout_from(layout),
      .weight_layout = layout_from(weight_layout, "weight_layout"),
      .threshold = limit_from(threshold_object).value_or(Limit{}),
      .inside = write_optional("inside", inside_object),
      .clip = limit,
      .scale = mean_scale ? write("scale", scale_object) : read_optional("scale", scale_object),
      .bias = read_optional("bias", bias_object),
      .residual = read_optional("residual", residual_object),
      .mean_scale = mean_scale};
  const std::optional<Array> scratch = write("scratch", scratch_object);
  nb::gil_scoped_release unlocked;
  sign_conv2d(shape, arrays, scratch_from(scratch, arrays.x.device), {stream, threads});
}

void operands(nb::handle bits_object, nb::handle weight_object, nb::handle signs_object,
              nb::handle filters_object, const std::string& layout, nb::handle scale_object,
              OptionalStream stream, OptionalThreads threads) {
  const Array bits = read("bits", bits_object), weight = read("weight", weight_object);
  const Array signs = write("signs", signs_object), filters = write("filters", filters_object);
  const auto scale = read_optional("scale", scale_object);
  nb::gil_scoped_release unlocked;
  sign_conv2d_operands(bits, weight, signs, filters, layout_from(layout), scale, {stream, threads});
}

void mask(nb::handle x_object, nb::handle bits_object, const std::string& layout,
          OptionalStream stream, OptionalThreads threads) {
  const Array x = write("x", x_object), bits = read("bits", bits_object);
  nb::gil_scoped_release unlocked;
  mask_values(x, bits, layout_from(layout), {stream, threads});
}

void gradient_of_weight(nb::handle gradient_object, nb::handle weight_object, nb::handle out_object,
                        nb::handle scale_object, float limit, OptionalStream stream,
                        OptionalThreads threads) {
  const Array gradient = read("gradient", gradient_object), weight = read("weight", weight_object);
  const Array out = write("out", out_object);
  const auto scale = read_optional("scale", scale_object);
  nb::gil_scoped_release unlocked;
  weight_gradient(gradient, weight, out, scale, limit, {stream, threads});
}

void mean(nb::handle x_object, nb::handle out_object, OptionalStream stream,
          OptionalThreads threads) {
  const Array x = read("x", x_object), out = write("out", out_object);
  nb::gil_scoped_release unlocked;
  abs_mean(x, out, {stream, threads});
}

void scale(nb::handle x_object, nb::handle scale_object, nb::handle out_object,
           const std::string& layout, OptionalStream stream, OptionalThreads threads) {
  const Array x = read("x", x_object), out = write("out", out_object);
  const Array factors = read("scale", scale_object);
  nb::gil_scoped_release unlocked;
  scale_channels(x, factors, out, layout_from(layout), {stream, threads});
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

// repr and equality as a dataclass has them; as what can change, a shape has no hash.
template <class Shape>
void bind_value(nb::class_<Shape>& type, const std::vector<const char*>& fields) {
  const auto values_of = [fields](nb::handle shape) {
    nb::dict values;
    for (const char* field : fields) values[field] = shape.attr(field);
    return values;
  };
  using Handle = nb::handle_t<Shape>;
  type.def("__repr__", [values_of](Handle self) {
    nb::list arguments;
    for (const auto& [name, value] : values_of(self))
      arguments.append(nb::str("{}={!r}").format(name, value));
    return nb::str("{}({})").format(self.type().attr("__name__"),
                                    nb::str(", ").attr("join")(arguments));
  });
  type.def(
      "__eq__",
      [values_of](Handle self, Handle other) { return values_of(self).equal(values_of(other)); },
      nb::is_operator());
  type.attr("__hash__") = nb::none();
}

void bind_shapes(nb::module_& m) {
  nb::class_<WeightShape> weight_shape(m, "WeightShape", "Sizes of a weight tensor.");
  weight_shape
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
  bind_value(weight_shape,
             {"out_channels", "in_channels", "kernel_height", "kernel_width", "groups"});
  using Pair = std::pair<int64_t, int64_t>;
  using Quad = std::tuple<int64_t, int64_t, int64_t, int64_t>;
  nb::class_<Conv2dShape> shape(
      m, "Conv2dShape", "All sizes of a convolution; padding is (top, left, bottom, right).");
  shape
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
  bind_value(shape, {"batch", "in_height", "in_width", "weight", "stride", "padding", "dilation",
                     "pad_value"});
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
        return sign_conv2d_bytes(shape, prepared, queue_for(Device{device}, threads));
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
  m.def("sign_conv2d", convolve_signs, "shape"_a, "x"_a.none(), "weight"_a.none(), "bits"_a.none(),
        "out"_a.none(), "scratch"_a.none(), nb::kw_only(), "layout"_a = "nchw",
        "weight_layout"_a = "nchw", "threshold"_a = nb::none(), "inside"_a = nb::none(),
        "limit"_a = 1.0f, "scale"_a = nb::none(), "mean_scale"_a = false, "bias"_a = nb::none(),
        "residual"_a = nb::none(), "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("sign_conv2d_operands", operands, "bits"_a.none(), "weight"_a.none(), "signs"_a.none(),
        "filters"_a.none(), nb::kw_only(), "layout"_a = "nchw", "scale"_a = nb::none(),
        "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("mask_values", mask, "x"_a.none(), "bits"_a.none(), nb::kw_only(), "layout"_a = "nchw",
        "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("weight_gradient", gradient_of_weight, "gradient"_a.none(), "weight"_a.none(),
        "out"_a.none(), nb::kw_only(), "scale"_a = nb::none(), "limit"_a = 1.0f,
        "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("abs_mean", mean, "x"_a.none(), "out"_a.none(), nb::kw_only(), "stream"_a = nb::none(),
        "threads"_a = nb::none());
  m.def("scale_channels", scale, "x"_a.none(), "scale"_a.none(), "out"_a.none(), nb::kw_only(),
        "layout"_a = "nchw", "stream"_a = nb::none(), "threads"_a = nb::none());
  m.def("register_operators", register_operators);
}
