#include "conv2d_check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "test.h"

namespace binconv::test {
namespace {

using reference::Image;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

ImageShape input_image(const Conv2dShape& s) {
  return {s.batch, s.weight.in_channels, s.in_height, s.in_width};
}

ImageShape weight_image(const WeightShape& s) {
  return {s.out_channels, s.in_channels / s.groups, s.kernel_height, s.kernel_width};
}

Image random_image(const ImageShape& shape, uint64_t seed) {
  Image image(shape);
  Random(seed).fill_signs(image.values);
  return image;
}

Image constant_image(const ImageShape& shape, int value) {
  Image image(shape);
  std::fill(image.values.begin(), image.values.end(), static_cast<int8_t>(value));
  return image;
}

// Mostly ordinary numbers, and now and then one that breaks a shortcut.
std::vector<float> draw_scale(Random& random, int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) {
    switch (random.between(0, 19)) {
      case 0:
        value = 0.0f;
        break;
      case 1:
        value = -0.0f;
        break;
      case 2:
        value = 1e-42f;
        break;
      case 3:
        value = -3e4f;
        break;
      case 4:
        value = kInfinity;
        break;
      case 5:
        value = kNaN;
        break;
      case 6:
        value = 1e38f;
        break;
      default:
        value = random.uniform(-1.5f, 1.5f);
    }
  }
  return values;
}

std::vector<float> draw_addend(Random& random, int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) {
    switch (random.between(0, 39)) {
      case 0:
        value = 0.0f;
        break;
      case 1:
        value = -0.0f;
        break;
      case 2:
        value = -1e-42f;
        break;
      case 3:
        value = 1e8f;
        break;
      case 4:
        value = -kInfinity;
        break;
      case 5:
        value = kNaN;
        break;
      default:
        value = random.uniform(-100.0f, 100.0f);
    }
  }
  return values;
}

// Thresholds on, just beside and far from results that occur.
float draw_threshold(Random& random, float y) {
  switch (random.between(0, 9)) {
    case 0:
      return random.uniform(-50.0f, 50.0f);
    case 1:
      return -kInfinity;
    case 2:
      return kNaN;
    case 3:
      return -0.0f;
    case 4:
      return std::nextafter(y, kInfinity);
    case 5:
      return std::nextafter(y, -kInfinity);
    default:
      return y;
  }
}

// Values that a type has, on both sides of every threshold that draw_value_threshold gives.
std::vector<float> draw_values(Random& random, DataType type) {
  const bool is_int8 = type == DataType::kInt8;
  std::vector<float> values = {-128, 127};
  if (!is_int8) values = {kInfinity, -kInfinity, kNaN, -kNaN, -0.0f, 1e-41f, -1e-41f, 3e38f};
  values.insert(values.end(), {0, 1, 0.5f, -1, 0.25f});
  while (values.size() < 64) {
    const bool is_near = random.one_in(2);
    values.push_back(is_near ? random.uniform(-2.0f, 2.0f) : random.uniform(-128.0f, 127.0f));
  }
  const std::vector<uint8_t> encoded = reference::encode(type, values);
  for (size_t i = 0; i < values.size(); ++i) values[i] = reference::load(type, encoded.data(), i);
  return values;
}

// On or just beside values that occur.
float draw_value_threshold(Random& random, DataType type, const std::vector<float>& values) {
  if (random.one_in(2)) return random.pick({0.0f, 0.5f, -1.0f});
  if (type == DataType::kInt8) return static_cast<float>(random.between(-255, 254)) / 2;
  float near;
  do near = values[random.between(0, std::ssize(values) - 1)];
  while (std::isnan(near));
  return random.one_in(2) ? near : std::nextafter(near, random.pick({kInfinity, -kInfinity}));
}

// A dense image of some of the choices, whose bits are those of a packed image.
std::vector<uint8_t> encode_bits(Random& random, const ImageShape& image,
                                 const std::vector<uint8_t>& packed, DataType type, Layout layout,
                                 const std::vector<float>& choices,
                                 const std::vector<float>& thresholds) {
  const std::vector<uint8_t> encoded = reference::encode(type, choices);
  const int64_t bytes = reference::element_bytes(type);
  const int64_t pixel_bytes = reference::pixel_bytes(image.channels);
  std::vector<uint8_t> array(reference::element_count(image) * bytes);
  for (int64_t pixel = 0; pixel < image.batch * image.height * image.width; ++pixel) {
    for (int64_t c = 0; c < image.channels; ++c) {
      const float threshold = thresholds[thresholds.size() == 1 ? 0 : c];
      const int bit = (packed[pixel * pixel_bytes + c / 8] >> (c % 8)) & 1;
      int64_t choice;
      do choice = random.between(0, std::ssize(choices) - 1);
      while (reference::bit(choices[choice], threshold, false) != bit);
      const int64_t index =
          reference::offset(image, layout, pixel / (image.height * image.width), c,
                            pixel / image.width % image.height, pixel % image.width);
      std::memcpy(&array[index * bytes], &encoded[choice * bytes], bytes);
    }
  }
  return array;
}

std::string channel_and_pixel(const ImageShape& output, int64_t pixel, int64_t o) {
  std::ostringstream text;
  text << "output [n = " << pixel / (output.height * output.width) << "][o = " << o
       << "][p = " << pixel / output.width % output.height << "][q = " << pixel % output.width
       << "]";
  return text.str();
}

}  // namespace

std::vector<uint8_t> draw_values_of(const std::vector<uint8_t>& packed, const ImageShape& image,
                                    DataType type, Layout layout, Random& random) {
  return encode_bits(random, image, packed, type, layout, draw_values(random, type), {0.0f});
}

Conv2dShape shape_1x1(int64_t batch, int64_t in_channels, int64_t in_height, int64_t in_width,
                      int64_t out_channels) {
  return {.batch = batch,
          .in_height = in_height,
          .in_width = in_width,
          .weight = {.out_channels = out_channels,
                     .in_channels = in_channels,
                     .kernel_height = 1,
                     .kernel_width = 1}};
}

Conv2dShape shape_3x3(int64_t batch, int64_t in_channels, int64_t in_height, int64_t in_width,
                      int64_t out_channels) {
  Conv2dShape shape = shape_1x1(batch, in_channels, in_height, in_width, out_channels);
  shape.weight.kernel_height = shape.weight.kernel_width = 3;
  shape.pad_top = shape.pad_left = shape.pad_bottom = shape.pad_right = 1;
  return shape;
}

std::string describe(const Conv2dShape& s) {
  std::ostringstream text;
  text << "conv2d of batch " << s.batch << ", image " << s.in_height << "x" << s.in_width
       << ", channels " << s.weight.in_channels << " -> " << s.weight.out_channels << ", kernel "
       << s.weight.kernel_height << "x" << s.weight.kernel_width << ", groups " << s.weight.groups
       << ", stride " << s.stride_height << "x" << s.stride_width << ", pads top " << s.pad_top
       << " left " << s.pad_left << " bottom " << s.pad_bottom << " right " << s.pad_right
       << ", dilation " << s.dilation_height << "x" << s.dilation_width << ", pad_value "
       << s.pad_value;
  return text.str();
}

std::string describe(const EpilogueCase& e) {
  std::ostringstream text;
  text << "epilogue to " << reference::type_name(e.out_type)
       << (e.out_layout == Layout::kNHWC ? " in NHWC" : " in NCHW");
  if (e.clamp) text << ", clamp";
  if (e.scale) text << ", scale";
  if (e.bias) text << ", bias";
  if (e.residual) text << ", residual of " << reference::type_name(*e.residual);
  if (e.activation) {
    text << ", activation of" << (e.activation->in_shift ? " in_shift" : "")
         << (e.activation->slope ? " slope" : " ReLU")
         << (e.activation->out_shift ? " out_shift" : "");
  }
  if (e.bits_beside) text << ", bits beside";
  if (e.writes_bits() && e.thresholds == EpilogueCase::Thresholds::kPerChannel) {
    text << ", a threshold per channel";
  }
  if (e.writes_bits() && e.below) text << ", bits below some thresholds";
  return text.str();
}

Conv2dShape random_shape(Random& random) {
  constexpr int64_t kMaxWork = 6'000'000;
  for (;;) {
    Conv2dShape s;
    s.batch = random.one_in(20) ? 0 : random.between(1, 3);
    s.in_height = random.between(1, random.one_in(4) ? 40 : 12);
    s.in_width = random.between(1, random.one_in(4) ? 70 : 12);
    s.weight.groups = random.one_in(3) ? random.between(2, 6) : 1;
    const int64_t group_channels =
        s.weight.groups > 1
            ? 8 * random.between(1, random.one_in(3) ? 40 : 5)
            : random.pick<int64_t>({1, 7, 8, 31, 32, 33, 48, 64, 96, 127, 128, 129, 130, 256, 257,
                                    512, 640, random.between(1, 300)});
    s.weight.in_channels = s.weight.groups * group_channels;
    s.weight.out_channels =
        s.weight.groups *
        random.pick<int64_t>({1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 65, random.between(1, 150)});
    s.weight.kernel_height = random.pick<int64_t>({1, 1, 2, 3, 3, 3, 5, 7});
    s.weight.kernel_width = random.one_in(3) ? random.between(1, 8) : s.weight.kernel_height;
    s.stride_height = random.pick<int64_t>({1, 1, 1, 2, 2, 3});
    s.stride_width = random.one_in(3) ? random.between(1, 5) : s.stride_height;
    s.pad_top = random.between(0, 3);
    const bool even_pads = !random.one_in(3);
    s.pad_left = even_pads ? s.pad_top : random.between(0, 9);
    s.pad_bottom = even_pads ? s.pad_top : random.between(0, 9);
    s.pad_right = even_pads ? s.pad_top : random.between(0, 4);
    s.dilation_height = random.pick<int64_t>({1, 1, 1, 2, 3});
    s.dilation_width = random.one_in(4) ? random.between(1, 6) : s.dilation_height;
    s.pad_value = static_cast<int>(random.between(-1, 1));
    const ImageShape out = reference::output_shape(s);
    const int64_t outputs = reference::element_count(out);
    if (out.height < 1 || out.width < 1) continue;
    if (outputs * group_channels * s.weight.kernel_height * s.weight.kernel_width > kMaxWork)
      continue;
    return s;
  }
}

Conv2dShape random_pointwise_shape(Random& random) {
  constexpr int64_t kMaxWork = 6'000'000;
  for (;;) {
    Conv2dShape s;
    s.batch = random.between(1, 4);
    s.in_height = random.between(1, random.one_in(4) ? 60 : 15);
    s.in_width = random.between(1, random.one_in(4) ? 60 : 15);
    s.weight.in_channels = random.one_in(4) ? random.between(1, 400)
                                            : 8 * random.between(1, random.one_in(3) ? 100 : 24);
    s.weight.out_channels =
        random.one_in(2) ? random.between(1, 300)
                         : random.pick<int64_t>({1, 7, 8, 32, 33, 64, 65, 96, 128, 129, 256, 513});
    s.weight.kernel_height = s.weight.kernel_width = 1;
    s.stride_height = random.between(1, 3);
    s.stride_width = random.one_in(3) ? random.between(1, 3) : s.stride_height;
    const int64_t outputs = reference::element_count(reference::output_shape(s));
    if (outputs * s.weight.in_channels <= kMaxWork) return s;
  }
}

EpilogueCase random_epilogue(Random& random) {
  EpilogueCase e;
  e.out_type = random.pick({DataType::kInt32, DataType::kFloat32, DataType::kFloat16,
                            DataType::kBFloat16, DataType::kBits, DataType::kBits});
  if (e.out_type != DataType::kBits && random.one_in(2)) e.out_layout = Layout::kNCHW;
  e.clamp = random.one_in(3);
  if (e.out_type == DataType::kInt32) return e;
  e.scale = random.one_in(2);
  e.bias = random.one_in(2);
  if (random.one_in(2)) {
    e.residual = random.pick({DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16});
  }
  if (random.one_in(2)) {
    e.activation = {
        .in_shift = random.one_in(2), .slope = random.one_in(2), .out_shift = random.one_in(2)};
  }
  if (random.one_in(2)) e.thresholds = EpilogueCase::Thresholds::kPerChannel;
  e.below = random.one_in(2);
  e.bits_beside = e.out_type != DataType::kBits && random.one_in(2);
  return e;
}

Problem::Problem(const Conv2dShape& shape, uint64_t seed, int64_t work)
    : Problem(shape, random_image(input_image(shape), 2 * seed),
              random_image(weight_image(shape.weight), 2 * seed + 1), seed, work) {}

Problem Problem::constant(const Conv2dShape& shape, int x, int weight, int64_t work) {
  return Problem(shape, constant_image(input_image(shape), x),
                 constant_image(weight_image(shape.weight), weight), 1, work);
}

Problem::Problem(const Conv2dShape& shape, const Image& x, const Image& weight, uint64_t seed,
                 int64_t work)
    : shape_(shape),
      output_(reference::output_shape(shape)),
      packed_input_(reference::pack(x)),
      packed_weight_(reference::pack(weight)),
      seed_(seed) {
  const int64_t pixels = output_.batch * output_.height * output_.width;
  const int64_t work_per_pixel = static_cast<int64_t>(weight.values.size());
  const int64_t checked = std::min(pixels, std::max<int64_t>(work / work_per_pixel, 2));
  Random random(seed);
  for (int64_t i = 0; i < checked; ++i) {
    const bool all = checked == pixels;
    pixels_.push_back(all ? i : i == 0 ? 0 : i == 1 ? pixels - 1 : random.between(0, pixels - 1));
  }
  acc_.reserve(pixels_.size() * output_.channels);
  for (int64_t pixel : pixels_) {
    for (int64_t o = 0; o < output_.channels; ++o) {
      acc_.push_back(
          reference::convolve_at(shape, x, weight, pixel / (output_.height * output_.width), o,
                                 pixel / output_.width % output_.height, pixel % output_.width));
    }
  }
}

std::shared_ptr<Buffer> prepare(const WeightShape& shape, const std::vector<uint8_t>& packed,
                                const Queue& queue, Placement placement) {
  const Buffer packed_weight(queue, packed, 16, placement);
  auto prepared =
      std::make_shared<Buffer>(queue, prepared_weight_bytes(shape, queue), 16, placement);
  prepare_weight(shape, packed_weight.data(), prepared->data(), queue);
  prepared->check_guards("prepared weight");
  prepared->remember();
  packed_weight.check_unchanged("packed weight");
  return prepared;
}

Run::Run(const Problem& problem, const Queue& queue, Placement placement)
    : Run(problem, queue,
          prepare(problem.shape().weight, problem.packed_weight(), queue, placement), placement) {}

Run::Run(const Problem& problem, const Queue& queue, std::shared_ptr<Buffer> prepared,
         Placement placement)
    : problem_(problem),
      queue_(queue),
      placement_(placement),
      prepared_(std::move(prepared)),
      input_(queue, problem.packed_input(), 16, placement) {}

void Run::launch(const Epilogue& epilogue, const Buffer& output, const Values* x) const {
  const Conv2dShape& shape = problem_.shape();
  const int64_t bytes = x ? values_workspace_bytes(shape, queue_) : workspace_bytes(shape, queue_);
  const Buffer workspace(queue_, bytes, 16, placement_);
  void* const scratch = bytes == 0 ? nullptr : workspace.data();
  if (x) {
    binary_conv2d(shape, *x, prepared_->data(), epilogue, output.data(), scratch, queue_);
  } else {
    binary_conv2d(shape, input_.data(), prepared_->data(), epilogue, output.data(), scratch,
                  queue_);
  }
  output.check_guards("output");
  workspace.check_guards("workspace");
  input_.check_unchanged("input");
  prepared_->check_unchanged("prepared weight");
}

std::vector<uint8_t> Run::sums() const {
  const Buffer output(queue_, reference::element_count(problem_.output()) * 4, 4, placement_);
  launch({.out_type = DataType::kInt32}, output);
  return output.read();
}

// What a case is run with. Empty: the case has none of these.
struct Run::Numbers {
  std::vector<float> scale, bias;
  DataType residual_type = DataType::kFloat32;
  std::vector<uint8_t> residual;
  std::vector<float> in_shift, slope, out_shift;
  std::vector<float> thresholds;  // All the same for a scalar one.
  std::vector<uint8_t> below;
};

namespace {

template <class T>
const T* element(const std::vector<T>& values, int64_t i) {
  return values.empty() ? nullptr : &values[i];
}

}  // namespace

Run::Numbers Run::draw(const EpilogueCase& which) const {
  const int64_t channels = problem_.output().channels;
  const auto count = [&](bool wanted) { return wanted ? channels : 0; };
  const EpilogueCase::Activation activation = which.activation.value_or(EpilogueCase::Activation{});
  Random random(problem_.seed() + 17);
  Numbers numbers;
  numbers.scale = draw_scale(random, count(which.scale));
  numbers.bias = draw_addend(random, count(which.bias));
  numbers.residual_type = which.residual.value_or(DataType::kFloat32);
  const int64_t outputs = reference::element_count(problem_.output());
  numbers.residual =
      reference::encode(numbers.residual_type, draw_addend(random, which.residual ? outputs : 0));
  numbers.in_shift = draw_addend(random, count(activation.in_shift));
  numbers.slope = draw_scale(random, count(activation.slope));
  numbers.out_shift = draw_addend(random, count(activation.out_shift));
  if (!which.writes_bits()) return numbers;

  const std::vector<float> y = results(which, numbers);
  const int64_t pixels = static_cast<int64_t>(problem_.pixels().size());
  for (int64_t o = 0; o < channels; ++o) {
    const float near = pixels == 0 ? 0.0f : y[random.between(0, pixels - 1) * channels + o];
    const bool fresh = o == 0 || which.thresholds == EpilogueCase::Thresholds::kPerChannel;
    numbers.thresholds.push_back(fresh ? draw_threshold(random, near) : numbers.thresholds[0]);
    // Any number but zero means below.
    if (which.below) numbers.below.push_back(random.pick<uint8_t>({0, 0, 1, 0x80}));
  }
  return numbers;
}

int Run::acc(const EpilogueCase& which, size_t i, int64_t o) const {
  const int acc = problem_.acc(i, o);
  return which.clamp && acc < 0 ? 0 : acc;
}

// The float32 result of every checked pixel and channel.
std::vector<float> Run::results(const EpilogueCase& which, const Numbers& numbers) const {
  const ImageShape& out = problem_.output();
  std::vector<float> results;
  for (size_t i = 0; i < problem_.pixels().size(); ++i) {
    const int64_t pixel = problem_.pixels()[i];
    const int64_t n = pixel / (out.height * out.width), p = pixel / out.width % out.height;
    for (int64_t o = 0; o < out.channels; ++o) {
      const int64_t index = reference::offset(out, which.out_layout, n, o, p, pixel % out.width);
      const float added =
          which.residual ? reference::load(numbers.residual_type, numbers.residual.data(), index)
                         : 0.0f;
      float y = reference::epilogue(acc(which, i, o), element(numbers.scale, o),
                                    element(numbers.bias, o), which.residual ? &added : nullptr);
      if (which.activation) {
        y = reference::activation(y, element(numbers.in_shift, o), element(numbers.slope, o),
                                  element(numbers.out_shift, o));
      }
      results.push_back(y);
    }
  }
  return results;
}

// The numbers in the memory of a queue's device.
struct Run::Operands {
  Operands(const Queue& queue, const Numbers& numbers, Placement placement)
      : residual(queue, numbers.residual, reference::element_bytes(numbers.residual_type),
                 placement),
        below(queue, numbers.below, 1, placement) {
    for (const auto* values : {&numbers.scale, &numbers.bias, &numbers.in_shift, &numbers.slope,
                               &numbers.out_shift, &numbers.thresholds}) {
      floats.push_back(std::make_unique<Buffer>(queue, *values, 4, placement));
    }
  }

  static const void* pointer(const Buffer& buffer) {
    return buffer.bytes() == 0 ? nullptr : buffer.data();
  }
  const float* pointer(size_t i) const { return static_cast<const float*>(pointer(*floats[i])); }

  Epilogue epilogue(const EpilogueCase& which, const Numbers& numbers) const {
    Epilogue epilogue{.out_type = which.out_type,
                      .out_layout = which.out_layout,
                      .clamp = which.clamp,
                      .scale = pointer(0),
                      .bias = pointer(1),
                      .residual = which.residual ? residual.data() : nullptr,
                      .residual_type = numbers.residual_type,
                      .activation = {.enabled = which.activation.has_value(),
                                     .in_shift = pointer(2),
                                     .slope = pointer(3),
                                     .out_shift = pointer(4)},
                      .threshold_below = static_cast<const uint8_t*>(pointer(below))};
    if (!numbers.thresholds.empty()) {
      const bool scalar = which.thresholds == EpilogueCase::Thresholds::kScalar;
      epilogue.threshold = {scalar ? numbers.thresholds[0] : kNaN, scalar ? nullptr : pointer(5)};
    }
    return epilogue;
  }

  void check_unchanged() const {
    residual.check_unchanged("residual");
    below.check_unchanged("threshold_below");
    constexpr const char* kNames[] = {"scale", "bias",      "in_shift",
                                      "slope", "out_shift", "threshold"};
    for (size_t i = 0; i < floats.size(); ++i) floats[i]->check_unchanged(kNames[i]);
  }

  Buffer residual, below;
  std::vector<std::unique_ptr<Buffer>> floats;
};

void Run::check(const EpilogueCase& which) const { check(which, nullptr); }

void Run::check(const EpilogueCase& which, const Values* x) const {
  const Context context(describe(which));
  const ImageShape& out = problem_.output();
  const Numbers numbers = draw(which);
  const std::vector<float> y = results(which, numbers);
  const Operands operands(queue_, numbers, placement_);
  Epilogue epilogue = operands.epilogue(which, numbers);

  const bool is_bits = which.out_type == DataType::kBits;
  const int64_t packed_bytes =
      out.batch * out.height * out.width * reference::pixel_bytes(out.channels);
  const int64_t element_bytes = reference::element_bytes(which.out_type);
  const int64_t value_bytes = reference::element_count(out) * element_bytes;
  const Buffer output(queue_, is_bits ? packed_bytes : value_bytes, is_bits ? 16 : element_bytes,
                      placement_);
  const Buffer bits(queue_, which.bits_beside ? packed_bytes : 0, 16, placement_);
  if (which.bits_beside) epilogue.bits = bits.data();
  launch(epilogue, output, x);
  bits.check_guards("bits");
  operands.check_unchanged();
  if (which.writes_bits()) check_bits(which, y, numbers, (is_bits ? output : bits).read());
  if (!is_bits) check_elements(which, y, output.read());
}

void Run::check_values(const EpilogueCase& which, DataType type, Layout layout,
                       bool per_channel) const {
  Random random(problem_.seed() + 29);
  const ImageShape image = input_image(problem_.shape());
  const std::vector<float> choices = draw_values(random, type);
  std::vector<float> thresholds(per_channel ? image.channels : 1);
  for (float& threshold : thresholds) threshold = draw_value_threshold(random, type, choices);
  const int64_t element_bytes = reference::element_bytes(type);
  const int64_t alignment = random.one_in(2) ? element_bytes : 64;
  const std::vector<uint8_t> values =
      encode_bits(random, image, problem_.packed_input(), type, layout, choices, thresholds);

  const Buffer x(queue_, values, alignment, placement_);
  const Buffer per_channel_thresholds(queue_, thresholds, 4, placement_);
  std::ostringstream text;
  text.precision(9);
  text << "values of " << reference::type_name(type)
       << (layout == Layout::kNHWC ? " in NHWC" : " in NCHW")
       << (placement_ == Placement::kOffEnd && alignment < 64 ? ", off a vector's alignment" : "");
  per_channel ? text << ", a threshold per channel" : text << ", threshold " << thresholds[0];
  const Context context(text.str());
  const Values taken{.data = x.data(),
                     .type = type,
                     .layout = layout,
                     .threshold = {per_channel ? kNaN : thresholds[0],
                                   per_channel ? per_channel_thresholds.as<float>() : nullptr}};
  check(which, &taken);
  x.check_unchanged("x");
  per_channel_thresholds.check_unchanged("threshold of x");
}

void Run::check_elements(const EpilogueCase& which, const std::vector<float>& y,
                         const std::vector<uint8_t>& output) const {
  const ImageShape& out = problem_.output();
  const DataType type = which.out_type;
  const int64_t bytes = reference::element_bytes(type);
  for (size_t i = 0; i < problem_.pixels().size(); ++i) {
    const int64_t pixel = problem_.pixels()[i];
    for (int64_t o = 0; o < out.channels; ++o) {
      const int64_t index =
          reference::offset(out, which.out_layout, pixel / (out.height * out.width), o,
                            pixel / out.width % out.height, pixel % out.width);
      const uint8_t* got = output.data() + index * bytes;
      const int sum = acc(which, i, o);
      uint8_t expected[4];
      if (type == DataType::kInt32) {
        std::memcpy(expected, &sum, sizeof sum);
      } else {
        reference::store(type, expected, 0, y[i * out.channels + o]);
      }
      if (reference::same_element(type, got, expected, 0)) continue;
      std::ostringstream message;
      message.precision(9);
      message << channel_and_pixel(out, pixel, o) << ": got ";
      if (type == DataType::kInt32) {
        int value;
        std::memcpy(&value, got, sizeof value);
        message << value << ", expected " << sum;
      } else {
        message << reference::load(type, got, 0) << ", expected "
                << reference::load(type, expected, 0) << ", from acc = " << sum
                << " and y = " << y[i * out.channels + o];
      }
      return report_failure(__FILE__, __LINE__, message.str());
    }
  }
}

void Run::check_bits(const EpilogueCase& which, const std::vector<float>& y, const Numbers& numbers,
                     const std::vector<uint8_t>& output) const {
  const ImageShape& out = problem_.output();
  const int64_t pixel_bytes = reference::pixel_bytes(out.channels);
  const auto bit = [&](int64_t pixel, int64_t channel) {
    return (output[pixel * pixel_bytes + channel / 8] >> (channel % 8)) & 1;
  };
  for (size_t i = 0; i < problem_.pixels().size(); ++i) {
    const int64_t pixel = problem_.pixels()[i];
    for (int64_t o = 0; o < out.channels; ++o) {
      const float value = y[i * out.channels + o];
      const bool below = which.below && numbers.below[o] != 0;
      const int expected = reference::bit(value, numbers.thresholds[o], below);
      if (bit(pixel, o) == expected) continue;
      std::ostringstream message;
      message.precision(9);
      message << channel_and_pixel(out, pixel, o) << ": got bit " << bit(pixel, o) << ", expected "
              << expected << ", from acc = " << acc(which, i, o) << ", y = " << value
              << (below ? " below" : " and") << " threshold = " << numbers.thresholds[o];
      return report_failure(__FILE__, __LINE__, message.str());
    }
  }
  for (int64_t pixel = 0; pixel < out.batch * out.height * out.width; ++pixel) {
    for (int64_t unused = out.channels; unused < pixel_bytes * 8; ++unused) {
      if (bit(pixel, unused) == 0) continue;
      return report_failure(
          __FILE__, __LINE__,
          channel_and_pixel(out, pixel, unused) + ": got 1, expected 0 in an unused bit");
    }
  }
}

void run_on_every_kernel(const Problem& problem, const std::function<void(const Run&)>& body,
                         Placement placement) {
  const Context shape_context(describe(problem.shape()));
  for (const Queue& queue : kernel_queues(problem.shape())) {
    const Context queue_context(describe(queue));
    run_guarded([&] { body(Run(problem, queue, placement)); });
  }
}

void check_on_every_kernel(const Problem& problem, const std::vector<EpilogueCase>& epilogues) {
  run_on_every_kernel(problem, [&](const Run& run) {
    for (const EpilogueCase& epilogue : epilogues) run.check(epilogue);
  });
}

void check_random_values(const Problem& problem, const Queue& queue, uint64_t seed) {
  Random random(seed + 41);
  const auto placement = random.pick({Placement::kStart, Placement::kEnd, Placement::kOffEnd});
  const DataType type =
      random.pick({DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16, DataType::kInt8});
  const Layout layout = random.pick({Layout::kNHWC, Layout::kNHWC, Layout::kNCHW});
  const bool per_channel = random.one_in(2);
  const EpilogueCase epilogue = random_epilogue(random);
  const auto check = [&](const Problem& checked) {
    Run(checked, queue, placement).check_values(epilogue, type, layout, per_channel);
  };
  if (!random.one_in(3)) return check(problem);
  const Problem pointwise(random_pointwise_shape(random), seed);
  const Context context(describe(pointwise.shape()));
  if (takes(queue, pointwise.shape())) check(pointwise);
}

}  // namespace binconv::test
