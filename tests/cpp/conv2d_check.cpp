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

const char* type_name(DataType type) {
  constexpr const char* kNames[] = {"int8", "int32", "float32", "float16", "bfloat16", "bits"};
  return kNames[static_cast<int>(type)];
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

std::string channel_and_pixel(const ImageShape& output, int64_t pixel, int64_t o) {
  std::ostringstream text;
  text << "output [n = " << pixel / (output.height * output.width) << "][o = " << o
       << "][p = " << pixel / output.width % output.height << "][q = " << pixel % output.width
       << "]";
  return text.str();
}

}  // namespace

Conv2dShape shape_3x3(int64_t batch, int64_t in_channels, int64_t in_height, int64_t in_width,
                      int64_t out_channels) {
  return {.batch = batch,
          .in_height = in_height,
          .in_width = in_width,
          .weight = {.out_channels = out_channels,
                     .in_channels = in_channels,
                     .kernel_height = 3,
                     .kernel_width = 3},
          .pad_top = 1,
          .pad_left = 1,
          .pad_bottom = 1,
          .pad_right = 1};
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
  text << "epilogue to " << type_name(e.out_type)
       << (e.out_layout == Layout::kNHWC ? " in NHWC" : " in NCHW");
  if (e.scale) text << ", scale";
  if (e.bias) text << ", bias";
  if (e.residual) text << ", residual of " << type_name(*e.residual);
  if (e.out_type == DataType::kBits && e.thresholds == EpilogueCase::Thresholds::kPerChannel) {
    text << ", a threshold per channel";
  }
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

EpilogueCase random_epilogue(Random& random) {
  EpilogueCase e;
  e.out_type = random.pick({DataType::kInt32, DataType::kFloat32, DataType::kFloat16,
                            DataType::kBFloat16, DataType::kBits, DataType::kBits});
  if (e.out_type != DataType::kBits && random.one_in(2)) e.out_layout = Layout::kNCHW;
  if (e.out_type == DataType::kInt32) return e;
  e.scale = random.one_in(2);
  e.bias = random.one_in(2);
  if (random.one_in(2)) {
    e.residual = random.pick({DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16});
  }
  if (random.one_in(2)) e.thresholds = EpilogueCase::Thresholds::kPerChannel;
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

void Run::launch(const Epilogue& epilogue, const Buffer& output) const {
  const int64_t bytes = workspace_bytes(problem_.shape(), queue_);
  const Buffer workspace(queue_, bytes, 16, placement_);
  binary_conv2d(problem_.shape(), input_.data(), prepared_->data(), epilogue, output.data(),
                bytes == 0 ? nullptr : workspace.data(), queue_);
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

void Run::check(const EpilogueCase& which) const {
  const Context context(describe(which));
  const ImageShape& out = problem_.output();
  const int64_t count = reference::element_count(out);
  const bool is_bits = which.out_type == DataType::kBits;
  Random random(problem_.seed() + 17);
  const std::vector<float> scale = draw_scale(random, out.channels);
  const std::vector<float> bias = draw_addend(random, out.channels);
  const DataType residual_type = which.residual.value_or(DataType::kFloat32);
  const std::vector<uint8_t> residual =
      reference::encode(residual_type, draw_addend(random, which.residual ? count : 0));

  std::vector<float> y;
  for (size_t i = 0; i < problem_.pixels().size(); ++i) {
    const int64_t pixel = problem_.pixels()[i];
    const int64_t n = pixel / (out.height * out.width), p = pixel / out.width % out.height;
    for (int64_t o = 0; o < out.channels; ++o) {
      float added = 0;
      if (which.residual) {
        added =
            reference::load(residual_type, residual.data(),
                            reference::offset(out, which.out_layout, n, o, p, pixel % out.width));
      }
      y.push_back(reference::epilogue(problem_.acc(i, o), which.scale ? &scale[o] : nullptr,
                                      which.bias ? &bias[o] : nullptr,
                                      which.residual ? &added : nullptr));
    }
  }

  std::vector<float> thresholds(out.channels, 0.0f);
  const bool per_channel = which.thresholds == EpilogueCase::Thresholds::kPerChannel;
  if (is_bits && !y.empty()) {
    for (int64_t o = 0; o < out.channels; ++o) {
      const size_t i = random.between(0, static_cast<int64_t>(problem_.pixels().size()) - 1);
      thresholds[o] =
          per_channel || o == 0 ? draw_threshold(random, y[i * out.channels + o]) : thresholds[0];
    }
  }

  const Buffer scale_buffer(queue_, scale, 4, placement_), bias_buffer(queue_, bias, 4, placement_);
  const Buffer residual_buffer(queue_, residual, reference::element_bytes(residual_type),
                               placement_);
  const Buffer threshold_buffer(queue_, thresholds, 4, placement_);
  Epilogue epilogue{.out_type = which.out_type, .out_layout = which.out_layout};
  if (which.scale) epilogue.scale = scale_buffer.as<float>();
  if (which.bias) epilogue.bias = bias_buffer.as<float>();
  if (which.residual) epilogue.residual = residual_buffer.data();
  epilogue.residual_type = residual_type;
  if (is_bits) epilogue.threshold.value = thresholds[0];
  if (is_bits && per_channel) epilogue.threshold = {kNaN, threshold_buffer.as<float>()};

  const int64_t pixel_bytes = reference::pixel_bytes(out.channels);
  const Buffer output(queue_,
                      is_bits ? out.batch * out.height * out.width * pixel_bytes
                              : count * reference::element_bytes(which.out_type),
                      is_bits ? 16 : reference::element_bytes(which.out_type), placement_);
  launch(epilogue, output);
  scale_buffer.check_unchanged("scale");
  bias_buffer.check_unchanged("bias");
  residual_buffer.check_unchanged("residual");
  threshold_buffer.check_unchanged("threshold");
  if (is_bits) {
    check_bits(y, thresholds, output.read());
  } else {
    check_elements(which, epilogue, y, output.read());
  }
}

void Run::check_elements(const EpilogueCase& which, const Epilogue& epilogue,
                         const std::vector<float>& y, const std::vector<uint8_t>& output) const {
  const ImageShape& out = problem_.output();
  const DataType type = epilogue.out_type;
  const int64_t bytes = reference::element_bytes(type);
  for (size_t i = 0; i < problem_.pixels().size(); ++i) {
    const int64_t pixel = problem_.pixels()[i];
    for (int64_t o = 0; o < out.channels; ++o) {
      const int64_t index =
          reference::offset(out, which.out_layout, pixel / (out.height * out.width), o,
                            pixel / out.width % out.height, pixel % out.width);
      const uint8_t* got = output.data() + index * bytes;
      const int acc = problem_.acc(i, o);
      uint8_t expected[4];
      if (type == DataType::kInt32) {
        std::memcpy(expected, &acc, sizeof acc);
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
        message << value << ", expected " << acc;
      } else {
        message << reference::load(type, got, 0) << ", expected "
                << reference::load(type, expected, 0) << ", from acc = " << acc
                << " and y = " << y[i * out.channels + o];
      }
      return report_failure(__FILE__, __LINE__, message.str());
    }
  }
}

void Run::check_bits(const std::vector<float>& y, const std::vector<float>& thresholds,
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
      const int expected = value >= thresholds[o] ? 1 : 0;
      if (bit(pixel, o) == expected) continue;
      std::ostringstream message;
      message.precision(9);
      message << channel_and_pixel(out, pixel, o) << ": got bit " << bit(pixel, o) << ", expected "
              << expected << ", from acc = " << problem_.acc(i, o) << ", y = " << value
              << " and threshold = " << thresholds[o];
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

void check_on_every_kernel(const Problem& problem, const std::vector<EpilogueCase>& epilogues) {
  const Context shape_context(describe(problem.shape()));
  for (const Queue& queue : kernel_queues()) {
    const Context queue_context(describe(queue));
    run_guarded([&] {
      const Run run(problem, queue);
      for (const EpilogueCase& epilogue : epilogues) run.check(epilogue);
    });
  }
}

}  // namespace binconv::test
