#include "operators.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <stdexcept>

#include "calls.h"
#include "tensor.h"

// The kernels of torch.ops.binconv. Their arguments are in the schemas of binconv.torch; an image
// is (N, C, H, W) there, whatever its memory format.

namespace binconv::python {
namespace {

using Sizes = std::vector<int64_t>;

std::optional<Array> array_of(const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return tensor->array(name);
}

Limit limit_of(const char* name, double value, const std::optional<Tensor>& per_channel) {
  return {static_cast<float>(value), array_of(name, per_channel)};
}

// One beyond float32 holds all of its finite numbers, as the largest of them does.
float finite_in_float32(double limit) {
  return static_cast<float>(std::min(limit, double{std::numeric_limits<float>::max()}));
}

Tensor dense(const char* name, Tensor x, Layout layout) {
  const size_t rank = x.sizes().size();
  if (layout == Layout::kNHWC && rank != 4) {
    fail(name, ": got ", rank, " dimensions, expected 4");
  }
  return x.is_dense(layout) ? std::move(x) : x.copied(layout);
}

// An image of values as its memory lies, or a copy of one with gaps there.
struct Image {
  Image(const char* name, Tensor x)
      : layout(x.is_channels_last() ? Layout::kNHWC : Layout::kNCHW),
        tensor(dense(name, std::move(x), layout)),
        array(tensor.array(name, layout)) {
    array.expect_type(kValueTypes);
    array.expect_rank(4);
  }
  const Sizes& sizes() const { return tensor.sizes(); }

  Layout layout;
  Tensor tensor;
  Array array;
};

// Packed bits as the kernels read them.
Tensor aligned(Tensor bits) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(bits.data()) % kPackedAlignment == 0;
  return is_aligned && bits.is_dense(Layout::kNCHW) ? std::move(bits) : bits.copied(Layout::kNCHW);
}

struct PackedImage {
  PackedImage(const char* name, Tensor x)
      : tensor(aligned(std::move(x))), array(tensor.array(name)) {
    array.expect_type(DataType::kBits);
    array.expect_rank(4);
  }

  Tensor tensor;
  Array array;
};

// A number that fits into 31 bits, so that products of two fit into 63.
int64_t checked(const char* name, int64_t value, int64_t least) {
  if (value < least || value > std::numeric_limits<int32_t>::max()) {
    fail(name, ": got ", value, ", expected ", least, " to 2^31 - 1");
  }
  return value;
}

// The type of a result that is not bits.
DataType out_type(const char* name, const Dtype& dtype) {
  const DataType type = dtype.type(name);
  if (type == DataType::kBits) {
    fail(name, ": got uint8, expected float32, float16, bfloat16 or an integer");
  }
  return type;
}

DataType float_type(const char* name, const Dtype& dtype) {
  const DataType type = dtype.type(name);
  if (std::find(kFloatTypes.begin(), kFloatTypes.end(), type) == kFloatTypes.end()) {
    fail(name, ": got ", type_name(type), ", expected float32, float16 or bfloat16");
  }
  return type;
}

Sizes packed_sizes(const Sizes& image) {
  return {image[0], image[2], image[3], packed_bytes(image[1])};
}

Scratch scratch_like(const Tensor& x, std::optional<Tensor>& memory) {
  return [&](int64_t bytes) {
    memory.emplace(x.new_empty({bytes}, DataType::kBits));
    return memory->data();
  };
}

// weight: its four sizes as in PyTorch. geometry: stride (2), padding (4: top, left, bottom,
// right), dilation (2), groups and pad value.
Conv2dShape shape_of(int64_t batch, int64_t height, int64_t width, std::span<const int64_t> weight,
                     std::span<const int64_t> geometry) {
  if (geometry.size() != 10) {
    fail("geometry: got ", geometry.size(), " numbers behind a weight's, expected 10");
  }
  const auto& g = geometry;
  const int64_t groups = checked("groups", g[8], 1);
  if (g[9] < -1 || g[9] > 1) fail("pad_value: got ", g[9], ", expected 0, 1 or -1");
  return {.batch = batch,
          .in_height = height,
          .in_width = width,
          .weight = {.out_channels = checked("weight", weight[0], 0),
                     .in_channels = checked("weight", weight[1], 0) * groups,
                     .kernel_height = checked("weight", weight[2], 0),
                     .kernel_width = checked("weight", weight[3], 0),
                     .groups = groups},
          .stride_height = g[0],
          .stride_width = g[1],
          .pad_top = g[2],
          .pad_left = g[3],
          .pad_bottom = g[4],
          .pad_right = g[5],
          .dilation_height = g[6],
          .dilation_width = g[7],
          .pad_value = static_cast<int>(g[9])};
}

// For a geometry that starts with the weight's sizes.
Conv2dShape shape_of(int64_t batch, int64_t height, int64_t width, const Sizes& geometry) {
  if (geometry.size() < 4) {
    fail("geometry: got ", geometry.size(), " numbers, expected 4 sizes of a weight and 10 others");
  }
  const std::span numbers(geometry);
  return shape_of(batch, height, width, numbers.first(4), numbers.subspan(4));
}

Sizes out_sizes(const Conv2dShape& shape) {
  return {shape.batch, shape.weight.out_channels, shape.out_height(), shape.out_width()};
}

void pack_bits(Stack& stack) {
  Tensor x = stack.tensor();
  const double threshold = stack.number();
  const auto channel_threshold = stack.optional_tensor();
  const Image image("x", std::move(x));
  Tensor packed = image.tensor.new_empty(packed_sizes(image.sizes()), DataType::kBits);
  pack_bits(image.array, image.layout, limit_of("threshold", threshold, channel_threshold),
            packed.array("packed"), {}, 0.0f, image.tensor.place());
  stack.give(std::move(packed));
}

void unpack_bits(Stack& stack) {
  Tensor given = stack.tensor();
  const int64_t channels = stack.integer();
  const Dtype dtype = stack.dtype();
  const PackedImage packed("packed", std::move(given));
  const Sizes& bits = packed.array.shape;
  const Sizes sizes = {bits[0], checked("channels", channels, 1), bits[1], bits[2]};
  Tensor out = packed.tensor.new_empty(sizes, out_type("dtype", dtype), Layout::kNHWC);
  unpack_bits(packed.array, out.array("dtype", Layout::kNHWC), Layout::kNHWC,
              packed.tensor.place());
  stack.give(std::move(out));
}

void abs_mean(Stack& stack) {
  Tensor given = stack.tensor();
  const int64_t rows = stack.integer();
  const Tensor x = dense("x", std::move(given), Layout::kNCHW);
  Tensor means = x.new_empty({checked("rows", rows, 0)}, DataType::kFloat32);
  abs_mean(x.array("x"), means.array("rows"), x.place());
  stack.give(std::move(means));
}

void prepare_weight(Stack& stack) {
  Tensor given = stack.tensor();
  const int64_t in_channels = stack.integer(), groups = stack.integer();
  const PackedImage packed("packed", std::move(given));
  const Sizes& bits = packed.array.shape;
  const WeightShape shape = {bits[0],
                             checked("in_channels", in_channels, 1) * checked("groups", groups, 1),
                             bits[1], bits[2], groups};
  const int64_t bytes = prepared_weight_bytes(shape, queue_for(packed.tensor.device(), {}));
  Tensor prepared = packed.tensor.new_empty({bytes}, DataType::kBits);
  prepare_weight(shape, packed.array, prepared.array("prepared"), packed.tensor.place());
  stack.give(std::move(prepared));
}

// The arguments that all convolutions with a prepared weight share.
struct Conv2dArguments {
  explicit Conv2dArguments(Stack& stack)
      : prepared(stack.tensor()),
        geometry(stack.ints()),
        out_dtype(stack.optional_dtype()),
        layout(stack.flag() ? Layout::kNHWC : Layout::kNCHW),
        scale(stack.optional_tensor()),
        bias(stack.optional_tensor()),
        residual(stack.optional_tensor()),
        clamp(stack.flag()),
        activates(stack.flag()),
        in_shift(stack.optional_tensor()),
        slope(stack.optional_tensor()),
        out_shift(stack.optional_tensor()),
        threshold(stack.number()),
        channel_threshold(stack.optional_tensor()),
        threshold_below(stack.optional_tensor()) {}

  Tensor prepared;
  Sizes geometry;
  std::optional<Dtype> out_dtype;  // None for bits.
  Layout layout;
  std::optional<Tensor> scale, bias, residual;
  bool clamp, activates;
  std::optional<Tensor> in_shift, slope, out_shift;
  double threshold;
  std::optional<Tensor> channel_threshold, threshold_below;
};

// Returns the result, or writes bits beside it.
Tensor convolve(const Conv2dShape& shape, const Tensor& x, const InputArray& input,
                Conv2dArguments& arguments, std::optional<Tensor>* bits = nullptr) {
  const Sizes sizes = out_sizes(shape);
  const bool to_bits = !arguments.out_dtype;
  const Layout layout = to_bits ? Layout::kNHWC : arguments.layout;
  Tensor out = to_bits ? x.new_empty(packed_sizes(sizes), DataType::kBits)
                       : x.new_empty(sizes, out_type("out_dtype", *arguments.out_dtype), layout);
  const Tensor prepared = aligned(std::move(arguments.prepared));
  EpilogueArrays epilogue = {
      .clamp = arguments.clamp,
      .scale = array_of("scale", arguments.scale),
      .bias = array_of("bias", arguments.bias),
      .activates = arguments.activates,
      .in_shift = array_of("in_shift", arguments.in_shift),
      .slope = array_of("slope", arguments.slope),
      .out_shift = array_of("out_shift", arguments.out_shift),
      .threshold_below = array_of("threshold_below", arguments.threshold_below)};
  std::optional<Tensor> residual;
  if (arguments.residual) {
    residual.emplace(dense("residual", std::move(*arguments.residual), layout));
    epilogue.residual = residual->array("residual", layout);
  }
  if (to_bits || bits || arguments.threshold != 0.0 || arguments.channel_threshold) {
    epilogue.threshold = limit_of("threshold", arguments.threshold, arguments.channel_threshold);
  }
  if (bits) {
    bits->emplace(x.new_empty(packed_sizes(sizes), DataType::kBits));
    epilogue.bits = (*bits)->array("bits");
  }
  std::optional<Tensor> memory;
  const Array out_array = out.array("out_dtype", to_bits ? Layout::kNCHW : layout);
  binary_conv2d(shape, input, prepared.array("prepared"), epilogue, out_array, layout,
                scratch_like(x, memory), x.place());
  return out;
}

struct PackedConv2d {
  explicit PackedConv2d(Stack& stack) : given(stack.tensor()), arguments(stack) {}

  Tensor operator()(std::optional<Tensor>* bits = nullptr) {
    const PackedImage packed("packed", std::move(given));
    const Sizes& n = packed.array.shape;
    const Conv2dShape shape = shape_of(n[0], n[1], n[2], arguments.geometry);
    return convolve(shape, packed.tensor, {packed.array}, arguments, bits);
  }

  Tensor given;
  Conv2dArguments arguments;
};

void packed_conv2d(Stack& stack) {
  PackedConv2d call(stack);
  stack.give(call());
}

void packed_conv2d_with_bits(Stack& stack) {
  PackedConv2d call(stack);
  std::optional<Tensor> bits;
  stack.give(call(&bits));
  stack.give(std::move(*bits));
}

void values_conv2d(Stack& stack) {
  Tensor x = stack.tensor();
  const auto threshold = stack.optional_tensor();
  Conv2dArguments arguments(stack);
  const Image image("x", std::move(x));
  const Sizes& n = image.sizes();
  const Conv2dShape shape = shape_of(n[0], n[2], n[3], arguments.geometry);
  const InputArray input = {image.array, image.layout, limit_of("input_threshold", 0.0, threshold)};
  stack.give(convolve(shape, image.tensor, input, arguments));
}

// The arguments of sign_conv2d_no_grad.
struct SignConv2dArguments {
  explicit SignConv2dArguments(Stack& stack)
      : x(stack.tensor()),
        weight(stack.tensor()),
        threshold(stack.optional_tensor()),
        scale(stack.optional_tensor()),
        bias(stack.optional_tensor()),
        residual(stack.optional_tensor()),
        prepared(stack.optional_tensor()),
        out_dtype(stack.dtype()),
        mean_scale(stack.flag()),
        clip(stack.optional_number()),
        geometry(stack.integers(10)) {}

  Tensor x, weight;
  std::optional<Tensor> threshold, scale, bias, residual, prepared;
  Dtype out_dtype;
  bool mean_scale;
  std::optional<double> clip;
  Sizes geometry;
};

// One of the images of bits in (count, N, H, W, bytes).
Array bits_at(const Tensor& bits, int64_t index) {
  Array array = bits.array("bits");
  array.shape.erase(array.shape.begin());
  int64_t bytes = 1;
  for (int64_t extent : array.shape) bytes *= extent;
  array.data = static_cast<uint8_t*>(array.data) + index * bytes;
  return array;
}

void sign_conv2d_no_grad(Stack& stack) {
  SignConv2dArguments given(stack);
  const Image x("x", std::move(given.x)), weight("weight", std::move(given.weight));
  const Sizes& n = x.sizes();
  const Conv2dShape shape = shape_of(n[0], n[2], n[3], weight.sizes(), given.geometry);
  if (given.mean_scale && given.scale) fail("scale: got one beside mean_scale, expected None");
  const Tensor& like = x.tensor;
  Sizes bits_sizes = packed_sizes(x.sizes());
  bits_sizes.insert(bits_sizes.begin(), given.clip ? 2 : 1);
  Tensor bits = like.new_empty(bits_sizes, DataType::kBits);
  Tensor out = like.new_empty(out_sizes(shape), out_type("out_dtype", given.out_dtype), x.layout);
  Tensor means = like.new_empty({given.mean_scale ? weight.sizes()[0] : 0}, DataType::kFloat32);
  std::optional<Tensor> prepared, residual, memory;
  if (given.prepared) {
    prepared.emplace(aligned(std::move(*given.prepared)));
    prepared->array("prepared").expect_type(DataType::kBits);
  }
  if (given.residual) residual.emplace(dense("residual", std::move(*given.residual), x.layout));
  SignConv2dArrays arrays = {
      .x = x.array,
      .weight = prepared ? prepared->array("prepared") : weight.array,
      .bits = bits_at(bits, 0),
      .out = out.array("out_dtype", x.layout),
      .layout = x.layout,
      .weight_layout = weight.layout,
      .threshold = limit_of("threshold", 0.0, given.threshold),
      .scale = given.mean_scale ? means.array("scale") : array_of("scale", given.scale),
      .bias = array_of("bias", given.bias),
      .mean_scale = given.mean_scale};
  if (residual) arrays.residual = residual->array("residual", x.layout);
  if (given.clip) {
    arrays.clip = finite_in_float32(*given.clip);
    arrays.inside = bits_at(bits, 1);
  }
  sign_conv2d(shape, arrays, scratch_like(like, memory), like.place());
  stack.give(std::move(out));
  stack.give(std::move(bits));
  stack.give(std::move(means));
}

// The arguments of sign_conv2d_backward.
struct GradientArguments {
  explicit GradientArguments(Stack& stack)
      : grad(stack.tensor()),
        bits(stack.tensor()),
        weight(stack.tensor()),
        scale(stack.optional_tensor()),
        needs_x(stack.flag()),
        needs_weight(stack.flag()),
        masks(stack.flag()),
        limit(stack.optional_number()),
        dtype(stack.dtype()),
        geometry(stack.integers(10)) {}

  Tensor grad, bits, weight;
  std::optional<Tensor> scale;
  bool needs_x, needs_weight, masks;
  std::optional<double> limit;
  Dtype dtype;
  Sizes geometry;
};

// The shape of the convolution, whose bits were kept.
Conv2dShape shape_of(const Tensor& bits, int64_t images, const Image& grad, const Image& weight,
                     const Sizes& geometry) {
  const Sizes& n = bits.sizes();
  if (n.size() != 5) fail("bits: got ", n.size(), " dimensions, expected 5");
  if (n[0] < images) fail("bits: got ", n[0], " images, expected at least ", images);
  const Conv2dShape shape = shape_of(n[1], n[2], n[3], weight.sizes(), geometry);
  const Queue queue = queue_for(bits_at(bits, 0), {&grad.array, &weight.array}, bits.place());
  workspace_bytes(shape, queue);  // Which checks the shape.
  grad.array.expect_type(kFloatTypes);
  Array in_order = grad.array;
  in_order.shape = grad.sizes();
  in_order.expect_shape(out_sizes(shape));
  return shape;
}

// scale * gradient where |weight| <= limit; out may be the gradient.
void finish_gradient(const Tensor& gradient, const Image& weight, const std::optional<Array>& scale,
                     double limit, const Tensor& out) {
  const float nearest = std::isinf(limit) ? static_cast<float>(limit) : finite_in_float32(limit);
  weight_gradient(gradient.array("gradient", weight.layout), weight.array,
                  out.array("dtype", weight.layout), scale, nearest, gradient.place());
}

// With room around it that has this value; or without what negative room takes away.
Tensor padded(const Tensor& x, const Sizes& left_right_top_bottom, int value) {
  Call call;
  call.tensor(x).ints(left_right_top_bottom).text("constant").optional_number(value);
  return std::move(*call("aten::pad")[0]);
}

struct Gradients {
  std::optional<Tensor> x, weight;  // None that is not needed.
};

// convT(grad, filters) and corr(grad, signs), as far as they are needed.
Gradients convolve_backward(const Conv2dShape& shape, const Tensor& grad, Tensor signs,
                            Tensor filters, bool needs_x, bool needs_weight) {
  const bool pads = shape.pad_value != 0 || shape.pad_top != shape.pad_bottom ||
                    shape.pad_left != shape.pad_right;
  const Sizes room = {shape.pad_left, shape.pad_right, shape.pad_top, shape.pad_bottom};
  if (pads) signs = padded(signs, room, shape.pad_value);
  // On a CPU, oneDNN's weight gradient is wrong for few channels in channels_last.
  const bool skips = shape.weight.kernel_height == 1 && shape.weight.kernel_width == 1 &&
                     std::max(shape.stride_height, shape.stride_width) > 1;
  if (skips && !grad.device().cuda) signs = signs.copied(Layout::kNCHW);
  const Tensor gradient = grad.detached();
  Call call;
  call.tensor(gradient)
      .tensor(signs)
      .tensor(filters)
      .none()
      .ints({shape.stride_height, shape.stride_width})
      .ints(pads ? Sizes{0, 0} : Sizes{shape.pad_top, shape.pad_left})
      .ints({shape.dilation_height, shape.dilation_width})
      .flag(false)
      .ints({0, 0})
      .integer(shape.weight.groups)
      .flags({needs_x, needs_weight, false});
  auto results = call("aten::convolution_backward", {needs_x, needs_weight, false});
  if (needs_x && pads) {
    results[0] = padded(*results[0], {-room[0], -room[1], -room[2], -room[3]}, 0);
  }
  return {std::move(results[0]), std::move(results[1])};
}

void weight_gradient(Stack& stack) {
  Tensor of_signs = stack.tensor(), values = stack.tensor();
  const auto scale = stack.optional_tensor();
  const double limit = stack.number();
  const Dtype dtype = stack.dtype();
  const Image weight("weight", std::move(values));
  const Tensor gradient = dense("gradient", std::move(of_signs), weight.layout);
  Tensor out = weight.tensor.new_empty(weight.sizes(), out_type("dtype", dtype), weight.layout);
  finish_gradient(gradient, weight, array_of("scale", scale), limit, out);
  stack.give(std::move(out));
}

void sign_conv2d_backward(Stack& stack) {
  GradientArguments given(stack);
  const Image grad("grad", std::move(given.grad)), weight("weight", std::move(given.weight));
  const Tensor& bits = given.bits;
  const Conv2dShape shape = shape_of(bits, 1 + given.masks, grad, weight, given.geometry);
  const DataType type = grad.array.type;
  const DataType weight_type = given.limit ? float_type("dtype", given.dtype) : type;
  if (given.limit && !(*given.limit >= 0.0)) {
    fail("limit: got ", *given.limit, ", expected at least 0");
  }
  const auto scale = array_of("scale", given.scale);
  const Sizes sizes = {shape.batch, shape.weight.in_channels, shape.in_height, shape.in_width};
  Tensor signs = bits.new_empty(sizes, type, Layout::kNHWC);
  Tensor filters = bits.new_empty(weight.sizes(), type, weight.layout);
  sign_conv2d_operands(bits_at(bits, 0), weight.array, signs.array("signs", Layout::kNHWC),
                       filters.array("filters", weight.layout), Layout::kNHWC, scale, bits.place());
  auto [of_x, of_signs] = convolve_backward(shape, grad.tensor, std::move(signs),
                                            std::move(filters), given.needs_x, given.needs_weight);
  if (of_x) of_x = dense("grad", std::move(*of_x), Layout::kNHWC);
  if (of_signs) of_signs = dense("grad", std::move(*of_signs), weight.layout);
  if (of_x && given.masks) {
    mask_values(of_x->array("grad", Layout::kNHWC), bits_at(bits, 1), Layout::kNHWC, bits.place());
  }
  if (of_signs && given.limit) {
    const Tensor gradient = std::move(*of_signs);
    of_signs = type == weight_type ? gradient.another()
                                   : bits.new_empty(weight.sizes(), weight_type, weight.layout);
    finish_gradient(gradient, weight, scale, *given.limit, *of_signs);
  }
  stack.give(of_x ? std::move(*of_x) : bits.new_empty({0}, type));
  stack.give(of_signs ? std::move(*of_signs) : bits.new_empty({0}, type));
}

// With errors that PyTorch makes ValueError and RuntimeError.
template <void (*kKernel)(Stack&)>
void boxed(StableIValue* values, uint64_t, uint64_t) {
  try {
    Stack stack(values);
    kKernel(stack);
  } catch (const Error& error) {
    if (error.status() == Status::kInvalidArgument) throw std::invalid_argument(error.what());
    throw std::runtime_error(error.what());
  }
}

}  // namespace

void register_operators() {
  load_torch();
  register_kernel("pack_bits", boxed<pack_bits>);
  register_kernel("unpack_bits", boxed<unpack_bits>);
  register_kernel("abs_mean", boxed<abs_mean>);
  register_kernel("prepare_weight", boxed<prepare_weight>);
  register_kernel("packed_conv2d", boxed<packed_conv2d>);
  register_kernel("packed_conv2d_no_grad", boxed<packed_conv2d>);
  register_kernel("packed_conv2d_with_bits", boxed<packed_conv2d_with_bits>);
  register_kernel("values_conv2d", boxed<values_conv2d>);
  register_kernel("sign_conv2d_no_grad", boxed<sign_conv2d_no_grad>);
  register_kernel("sign_conv2d_backward", boxed<sign_conv2d_backward>);
  register_kernel("weight_gradient", boxed<weight_gradient>);
}

}  // namespace binconv::python
