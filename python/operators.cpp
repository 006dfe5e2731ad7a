#include "operators.h"

#include <algorithm>
#include <limits>
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

Tensor dense(Tensor x, Layout layout) {
  return x.is_dense(layout) ? std::move(x) : x.copied(layout);
}

// An image as its memory lies, or a copy of one with gaps there.
struct Image {
  Image(const char* name, Tensor x)
      : layout(x.is_channels_last() ? Layout::kNHWC : Layout::kNCHW),
        tensor(dense(std::move(x), layout)),
        array(tensor.array(name, layout)) {
    array.expect_rank(4);
  }
  const Sizes& sizes() const { return tensor.sizes(); }

  Layout layout;
  Tensor tensor;
  Array array;
};

// Bits as the kernels read them.
Tensor aligned(Tensor bits) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(bits.data()) % kPackedAlignment == 0;
  return is_aligned && bits.is_dense(Layout::kNCHW) ? std::move(bits) : bits.copied(Layout::kNCHW);
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

// A weight's four sizes as in PyTorch, then stride (2), padding (4: top, left, bottom, right),
// dilation (2), groups and pad value.
Conv2dShape shape_of(int64_t batch, int64_t height, int64_t width, const Sizes& geometry) {
  if (geometry.size() != 14)
    fail("geometry: got ", geometry.size() - 4, " numbers behind a weight's, expected 10");
  const auto& g = geometry;
  for (int i = 0; i < 4; ++i) {
    if (g[i] < 0) fail("geometry: got ", g[i], " for a size of the weight, expected at least 0");
  }
  const WeightShape weight = {g[0], g[1] * g[12], g[2], g[3], g[12]};
  return {batch,
          height,
          width,
          weight,
          g[4],
          g[5],
          g[6],
          g[7],
          g[8],
          g[9],
          g[10],
          g[11],
          static_cast<int>(g[13])};
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
  const Tensor packed = aligned(std::move(given));
  const Array bits = packed.array("packed");
  bits.expect_rank(4);
  const Sizes sizes = {bits.shape[0], channels, bits.shape[1], bits.shape[2]};
  Tensor out = packed.new_empty(sizes, dtype.type("dtype"), Layout::kNHWC);
  unpack_bits(bits, out.array("out", Layout::kNHWC), Layout::kNHWC, packed.place());
  stack.give(std::move(out));
}

void abs_mean(Stack& stack) {
  Tensor given = stack.tensor();
  const int64_t rows = stack.integer();
  const Tensor x = dense(std::move(given), Layout::kNCHW);
  Tensor means = x.new_empty({rows}, DataType::kFloat32);
  abs_mean(x.array("x"), means.array("out"), x.place());
  stack.give(std::move(means));
}

void prepare_weight(Stack& stack) {
  Tensor given = stack.tensor();
  const int64_t in_channels = stack.integer(), groups = stack.integer();
  const Tensor packed = aligned(std::move(given));
  const Array bits = packed.array("packed");
  bits.expect_rank(4);
  const WeightShape shape = {bits.shape[0], in_channels * groups, bits.shape[1], bits.shape[2],
                             groups};
  const int64_t bytes = prepared_weight_bytes(shape, queue_for(packed.device(), {}));
  Tensor prepared = packed.new_empty({bytes}, DataType::kBits);
  prepare_weight(shape, bits, prepared.array("prepared"), packed.place());
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
  const Layout layout = to_bits ? Layout::kNCHW : arguments.layout;
  Tensor out = to_bits ? x.new_empty(packed_sizes(sizes), DataType::kBits)
                       : x.new_empty(sizes, arguments.out_dtype->type("out_dtype"), layout);
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
    residual.emplace(dense(std::move(*arguments.residual), arguments.layout));
    epilogue.residual = residual->array("residual", arguments.layout);
  }
  if (to_bits || bits) {
    epilogue.threshold = limit_of("threshold", arguments.threshold, arguments.channel_threshold);
  }
  if (bits) {
    bits->emplace(x.new_empty(packed_sizes(sizes), DataType::kBits));
    epilogue.bits = (*bits)->array("bits");
  }
  std::optional<Tensor> memory;
  binary_conv2d(shape, input, prepared.array("prepared"), epilogue, out.array("out", layout),
                arguments.layout, scratch_like(x, memory), x.place());
  return out;
}

struct PackedConv2d {
  explicit PackedConv2d(Stack& stack) : given(stack.tensor()), arguments(stack) {}

  Tensor operator()(std::optional<Tensor>* bits = nullptr) {
    const Tensor packed = aligned(std::move(given));
    const Array x = packed.array("packed");
    x.expect_rank(4);
    const Conv2dShape shape = shape_of(x.shape[0], x.shape[1], x.shape[2], arguments.geometry);
    return convolve(shape, packed, {x}, arguments, bits);
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
        geometry(stack.ints()),
        out_dtype(stack.dtype()),
        mean_scale(stack.flag()),
        clip(stack.optional_number()) {}

  Tensor x, weight;
  std::optional<Tensor> threshold, scale, bias, residual, prepared;
  Sizes geometry;
  Dtype out_dtype;
  bool mean_scale;
  std::optional<double> clip;
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
  Sizes geometry = weight.sizes();
  geometry.insert(geometry.end(), given.geometry.begin(), given.geometry.end());
  const Conv2dShape shape = shape_of(x.sizes()[0], x.sizes()[2], x.sizes()[3], geometry);
  const Tensor& like = x.tensor;
  Sizes bits_sizes = packed_sizes(x.sizes());
  bits_sizes.insert(bits_sizes.begin(), given.clip ? 2 : 1);
  Tensor bits = like.new_empty(bits_sizes, DataType::kBits);
  Tensor out = like.new_empty(out_sizes(shape), given.out_dtype.type("out_dtype"), x.layout);
  Tensor means = like.new_empty({given.mean_scale ? weight.sizes()[0] : 0}, DataType::kFloat32);
  std::optional<Tensor> prepared, residual, memory;
  if (given.prepared) prepared.emplace(aligned(std::move(*given.prepared)));
  if (given.residual) residual.emplace(dense(std::move(*given.residual), x.layout));
  SignConv2dArrays arrays = {
      .x = x.array,
      .weight = prepared ? prepared->array("prepared") : weight.array,
      .bits = bits_at(bits, 0),
      .out = out.array("out", x.layout),
      .layout = x.layout,
      .weight_layout = weight.layout,
      .threshold = limit_of("threshold", 0.0, given.threshold),
      .scale = given.mean_scale ? means.array("scale") : array_of("scale", given.scale),
      .bias = array_of("bias", given.bias),
      .mean_scale = given.mean_scale};
  if (residual) arrays.residual = residual->array("residual", x.layout);
  if (given.clip) {
    // One beyond float32 holds all of its finite numbers, as the largest of them does.
    constexpr double kLargest = std::numeric_limits<float>::max();
    arrays.clip = static_cast<float>(std::min(*given.clip, kLargest));
    arrays.inside = bits_at(bits, 1);
  }
  sign_conv2d(shape, arrays, scratch_like(like, memory), like.place());
  stack.give(std::move(out));
  stack.give(std::move(bits));
  stack.give(std::move(means));
}

void sign_conv2d_operands(Stack& stack) {
  const Tensor bits = stack.tensor();
  Tensor values = stack.tensor();
  const auto scale = stack.optional_tensor();
  const int64_t channels = stack.integer();
  const Dtype dtype = stack.dtype();
  const Array of_bits = bits.array("bits");
  of_bits.expect_rank(4);
  const Image weight("weight", std::move(values));
  const DataType type = dtype.type("dtype");
  const Sizes sizes = {of_bits.shape[0], channels, of_bits.shape[1], of_bits.shape[2]};
  Tensor signs = bits.new_empty(sizes, type, Layout::kNHWC);
  Tensor filters = weight.tensor.new_empty(weight.sizes(), type, weight.layout);
  sign_conv2d_operands(of_bits, weight.array, signs.array("signs", Layout::kNHWC),
                       filters.array("filters", weight.layout), Layout::kNHWC,
                       array_of("scale", scale), bits.place());
  stack.give(std::move(signs));
  stack.give(std::move(filters));
}

void mask_values(Stack& stack) {
  const Tensor x = stack.tensor(), bits = stack.tensor();
  const Layout layout = x.is_channels_last() ? Layout::kNHWC : Layout::kNCHW;
  mask_values(x.array("x", layout), bits.array("bits"), layout, x.place());
}

void weight_gradient(Stack& stack) {
  Tensor of_signs = stack.tensor(), values = stack.tensor();
  const auto scale = stack.optional_tensor();
  const double limit = stack.number();
  const Dtype dtype = stack.dtype();
  const Image weight("weight", std::move(values));
  const Tensor gradient = dense(std::move(of_signs), weight.layout);
  Tensor out = weight.tensor.new_empty(weight.sizes(), dtype.type("dtype"), weight.layout);
  weight_gradient(gradient.array("gradient", weight.layout), weight.array,
                  out.array("out", weight.layout), array_of("scale", scale),
                  static_cast<float>(limit), weight.tensor.place());
  stack.give(std::move(out));
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
  register_kernel("sign_conv2d_operands", boxed<sign_conv2d_operands>);
  register_kernel("mask_values", boxed<mask_values>);
  register_kernel("weight_gradient", boxed<weight_gradient>);
}

}  // namespace binconv::python
