#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "device.h"
#include "emulation/cases.h"
#include "emulation/gpu.h"
#include "random.h"
#include "reference.h"
#include "test.h"

namespace binconv::emulation {
namespace {

using namespace test;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct BitsCase {
  ImageShape shape;
  DataType type;
  Layout layout;
  Placement placement;
  std::vector<float> values;      // In the order of memory.
  std::vector<float> thresholds;  // One for all channels, or one for each.
  bool is_per_channel;
  float limit;
};

template <class Visit>
void for_each_value(const BitsCase& drawn, const Visit& visit) {
  const ImageShape& s = drawn.shape;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t h = 0; h < s.height; ++h) {
        for (int64_t w = 0; w < s.width; ++w) {
          visit(reference::offset(s, drawn.layout, n, c, h, w), n, c, h, w);
        }
      }
    }
  }
}

float threshold_of(const BitsCase& drawn, int64_t channel) {
  return drawn.thresholds[drawn.is_per_channel ? channel : 0];
}

ImageShape random_image(Random& random) {
  constexpr int64_t kMaxValues = 100'000;
  for (;;) {
    ImageShape s;
    s.channels = random.pick<int64_t>({1, 2, 3, 8, 17, 64, 96, 128, 130, 256, 1000, 20000});
    if (random.one_in(3)) s.channels = random.between(1, 700);
    s.batch = random.between(1, random.one_in(3) ? 20 : 3);
    s.height =
        random.one_in(3) ? random.between(1, 60) : random.pick<int64_t>({1, 2, 3, 4, 7, 14, 28});
    s.width = random.one_in(3) ? random.between(1, 60) : s.height;
    if (random.one_in(20)) s.width = random.between(300, 3000);
    if (reference::element_count(s) <= kMaxValues) return s;
  }
}

// Numbers that are equal often, and those whose order or rounding is special.
float random_number(Random& random, bool is_int8) {
  if (is_int8) return static_cast<float>(random.between(-128, 127));
  if (!random.one_in(20)) return static_cast<float>(random.between(-4, 4)) / 2;
  return random.pick({-0.0f, kNaN, kInfinity, -kInfinity, 1e-41f, -1e-41f, 6e-8f, 65504.0f, 1e38f});
}

float random_threshold(Random& random, bool is_int8) {
  if (random.one_in(3)) return random_number(random, is_int8);
  if (random.one_in(4))
    return random.pick({kNaN, kInfinity, -kInfinity, 1e-45f, -1e-45f, 70000.0f, 127.0f, 127.5f,
                        128.0f, -127.5f, -128.0f, -128.5f});
  return is_int8 ? random.uniform(-130.0f, 130.0f) : random.uniform(-2.0f, 2.0f);
}

float random_limit(Random& random) {
  if (random.one_in(3)) return random.uniform(0.0f, 4.0f);
  return random.pick({0.0f, 1e-45f, 6e-8f, 0.5f, 1.0f, 1.3f, 2.0f, 100.0f, 127.5f, 65504.0f,
                      70000.0f, 3e38f, std::numeric_limits<float>::max()});
}

// On an end of what a limit admits, or one step of the type beside it.
float random_end(Random& random, DataType type, float threshold, float limit) {
  const float end = reference::sum(threshold, random.one_in(2) ? limit : -limit);
  const float sign = random.pick({-1.0f, 0.0f, 1.0f});
  if (type == DataType::kInt8) return std::round(std::fmin(std::fmax(end + sign, -128.0f), 127.0f));
  const float step = type == DataType::kFloat32   ? 0x1p-23f
                     : type == DataType::kFloat16 ? 0x1p-10f
                                                  : 0x1p-7f;
  return end + end * sign * step;
}

BitsCase random_case(Random& random) {
  BitsCase drawn = {
      .shape = random_image(random),
      .type = random.pick(
          {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16, DataType::kInt8}),
      .layout = random.pick({Layout::kNCHW, Layout::kNHWC}),
      .placement = random.pick({Placement::kStart, Placement::kEnd, Placement::kOffEnd}),
      .is_per_channel = random.one_in(3),
      .limit = random_limit(random)};
  const bool is_int8 = drawn.type == DataType::kInt8;
  drawn.values.resize(reference::element_count(drawn.shape));
  for (float& value : drawn.values) value = random_number(random, is_int8);
  drawn.thresholds.resize(drawn.is_per_channel ? drawn.shape.channels : 1);
  for (float& threshold : drawn.thresholds) threshold = random_threshold(random, is_int8);
  for_each_value(drawn, [&](int64_t i, int64_t, int64_t c, int64_t, int64_t) {
    if (!random.one_in(4)) return;
    drawn.values[i] = random_end(random, drawn.type, threshold_of(drawn, c), drawn.limit);
  });
  return drawn;
}

std::string describe(const BitsCase& drawn) {
  const ImageShape& s = drawn.shape;
  return "image of batch " + std::to_string(s.batch) + ", channels " + std::to_string(s.channels) +
         ", " + std::to_string(s.height) + "x" + std::to_string(s.width) + ", type " +
         std::to_string(static_cast<int>(drawn.type)) +
         (drawn.layout == Layout::kNCHW ? ", NCHW" : ", NHWC") +
         (drawn.is_per_channel ? ", a threshold for each channel"
                               : ", threshold " + std::to_string(drawn.thresholds[0])) +
         ", limit " + std::to_string(drawn.limit);
}

// Packs the values, without and with a clip, and unpacks the result.
void check_bits(const BitsCase& drawn, const Queue& queue) {
  const int64_t bytes = reference::element_bytes(drawn.type);
  const std::vector<uint8_t> elements = reference::encode(drawn.type, drawn.values);
  reference::Image expected(drawn.shape), expected_inside(drawn.shape);
  std::vector<float> signs(drawn.values.size());
  for_each_value(drawn, [&](int64_t i, int64_t n, int64_t c, int64_t h, int64_t w) {
    const float value = reference::load(drawn.type, elements.data(), i);
    const float threshold = threshold_of(drawn, c);
    signs[i] = expected.at(n, c, h, w) = value >= threshold ? 1 : -1;
    expected_inside.at(n, c, h, w) = reference::is_inside(value, threshold, drawn.limit) ? 1 : -1;
  });
  const std::vector<uint8_t> expected_bits = reference::pack(expected);

  const Buffer x(queue, elements, bytes, drawn.placement);
  const Buffer thresholds(queue, drawn.thresholds, 4, drawn.placement);
  const Buffer packed(queue, packed_image_bytes(drawn.shape), 16, drawn.placement);
  const Threshold threshold = {
      .value = drawn.thresholds[0],
      .per_channel = drawn.is_per_channel ? thresholds.as<float>() : nullptr};
  pack_bits(drawn.shape, x.data(), drawn.type, drawn.layout, threshold, packed.data(), queue);
  packed.check_guards("packed");
  x.check_unchanged("x");
  CHECK_EQ(packed.read(), expected_bits);

  const Buffer clipped(queue, packed.bytes(), 16, drawn.placement);
  const Buffer inside(queue, packed.bytes(), 16, drawn.placement);
  pack_bits_and_clip(drawn.shape, x.data(), drawn.type, drawn.layout, threshold, drawn.limit,
                     clipped.data(), inside.data(), queue);
  clipped.check_guards("clipped");
  inside.check_guards("inside");
  x.check_unchanged("x");
  CHECK_EQ(clipped.read(), expected_bits);
  CHECK_EQ(inside.read(), reference::pack(expected_inside));

  const Buffer unpacked(queue, x.bytes(), bytes, drawn.placement);
  unpack_bits(drawn.shape, packed.data(), unpacked.data(), drawn.type, drawn.layout, queue);
  unpacked.check_guards("unpacked");
  CHECK_EQ(unpacked.read(), reference::encode(drawn.type, signs));
}

}  // namespace

void check_random_bits(uint64_t seed) {
  Random random(seed);
  device() = kHopper;
  device().multiprocessors = random.pick({132, 16, 1});  // Fewer make tiles larger.
  device().seed = seed;
  const BitsCase drawn = random_case(random);
  const Context context("bits, seed " + std::to_string(seed) + ": " + describe(drawn) + ", on " +
                        std::to_string(device().multiprocessors) + " multiprocessors");
  run_guarded([&] { check_bits(drawn, queues()[0]); });
}

}  // namespace binconv::emulation
