#include <cmath>
#include <limits>

#include "device.h"
#include "random.h"
#include "reference.h"
#include "test.h"

namespace binconv::test {
namespace {

constexpr int64_t kChannelCounts[] = {1, 7, 8, 31, 32, 33, 48, 64, 96, 127, 128, 130, 512};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kSmallest = std::numeric_limits<float>::denorm_min();
constexpr float kLargest = std::numeric_limits<float>::max();

std::string describe_image(const ImageShape& s, DataType type, Layout layout) {
  return "image of batch " + std::to_string(s.batch) + ", channels " + std::to_string(s.channels) +
         ", " + std::to_string(s.height) + "x" + std::to_string(s.width) + ", " +
         reference::type_name(type) + (layout == Layout::kNCHW ? ", NCHW" : ", NHWC");
}

// Runs pack_bits on guarded memory. `elements` holds the image as it lies in memory.
std::vector<uint8_t> pack(const ImageShape& shape, const std::vector<uint8_t>& elements,
                          DataType type, Layout layout, const Queue& queue, float threshold = 0.0f,
                          const std::vector<float>& per_channel = {},
                          Placement placement = Placement::kEnd) {
  const Context context(describe_image(shape, type, layout) + " on " + describe(queue));
  const Buffer x(queue, elements, reference::element_bytes(type), placement);
  const Buffer thresholds(queue, per_channel, 4, placement);
  const Buffer packed(
      queue, shape.batch * shape.height * shape.width * reference::pixel_bytes(shape.channels), 16,
      placement);
  pack_bits(shape, x.data(), type, layout,
            {threshold, per_channel.empty() ? nullptr : thresholds.as<float>()}, packed.data(),
            queue);
  packed.check_guards("packed");
  x.check_unchanged("x");
  thresholds.check_unchanged("thresholds");
  return packed.read();
}

std::vector<uint8_t> unpack(const ImageShape& shape, const std::vector<uint8_t>& bits,
                            DataType type, Layout layout, const Queue& queue,
                            Placement placement = Placement::kEnd) {
  const Context context(describe_image(shape, type, layout) + " on " + describe(queue));
  const Buffer packed(queue, bits, 16, placement);
  const Buffer x(queue, reference::element_count(shape) * reference::element_bytes(type),
                 reference::element_bytes(type), placement);
  unpack_bits(shape, packed.data(), x.data(), type, layout, queue);
  x.check_guards("x");
  packed.check_unchanged("packed");
  return x.read();
}

// The packed bits of is_one(x, channel).
template <class IsOne>
std::vector<uint8_t> bits_where(const ImageShape& s, const std::vector<uint8_t>& elements,
                                DataType type, Layout layout, const IsOne& is_one) {
  reference::Image image(s);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t h = 0; h < s.height; ++h) {
        for (int64_t w = 0; w < s.width; ++w) {
          const float x =
              reference::load(type, elements.data(), reference::offset(s, layout, n, c, h, w));
          image.at(n, c, h, w) = is_one(x, c) ? 1 : -1;
        }
      }
    }
  }
  return reference::pack(image);
}

// What pack_bits must write, by the definition of a bit.
std::vector<uint8_t> expected_bits(const ImageShape& shape, const std::vector<uint8_t>& elements,
                                   DataType type, Layout layout, float threshold,
                                   const std::vector<float>& per_channel) {
  return bits_where(shape, elements, type, layout, [&](float x, int64_t c) {
    return x >= (per_channel.empty() ? threshold : per_channel[c]);
  });
}

void check_pack(const ImageShape& shape, const std::vector<uint8_t>& elements, DataType type,
                Layout layout, float threshold = 0.0f, const std::vector<float>& per_channel = {},
                Placement placement = Placement::kEnd) {
  const std::vector<uint8_t> expected =
      expected_bits(shape, elements, type, layout, threshold, per_channel);
  for (const Queue& queue : queues()) {
    const std::vector<uint8_t> got =
        pack(shape, elements, type, layout, queue, threshold, per_channel, placement);
    const Context context(describe_image(shape, type, layout) + " on " + describe(queue) +
                          ", threshold " + std::to_string(threshold));
    CHECK_EQ(got, expected);
  }
}

void check_pack_and_clip(const ImageShape& shape, const std::vector<uint8_t>& elements,
                         DataType type, Layout layout, float threshold, float limit,
                         const std::vector<float>& per_channel = {},
                         Placement placement = Placement::kEnd) {
  const std::vector<uint8_t> expected =
      expected_bits(shape, elements, type, layout, threshold, per_channel);
  const std::vector<uint8_t> expected_inside =
      bits_where(shape, elements, type, layout, [&](float x, int64_t c) {
        return reference::is_inside(x, per_channel.empty() ? threshold : per_channel[c], limit);
      });
  for (const Queue& queue : queues()) {
    const Context context(describe_image(shape, type, layout) + " on " + describe(queue) +
                          ", threshold " + std::to_string(threshold) + ", limit " +
                          std::to_string(limit));
    const Buffer x(queue, elements, reference::element_bytes(type), placement);
    const Buffer thresholds(queue, per_channel, 4, placement);
    const int64_t bytes = static_cast<int64_t>(expected.size());
    const Buffer packed(queue, bytes, 16, placement), inside(queue, bytes, 16, placement);
    pack_bits_and_clip(shape, x.data(), type, layout,
                       {threshold, per_channel.empty() ? nullptr : thresholds.as<float>()}, limit,
                       packed.data(), inside.data(), queue);
    packed.check_guards("packed");
    inside.check_guards("inside");
    x.check_unchanged("x");
    thresholds.check_unchanged("thresholds");
    CHECK_EQ(packed.read(), expected);
    CHECK_EQ(inside.read(), expected_inside);
  }
}

// Small whole numbers, many of them zero: equal to thresholds often, and exact in every type.
std::vector<uint8_t> random_elements(const ImageShape& shape, DataType type, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(reference::element_count(shape));
  for (float& value : values) value = static_cast<float>(random.between(-3, 3));
  return reference::encode(type, values);
}

// For each channel one: between the numbers of random_elements, equal to some, or special.
std::vector<float> random_thresholds(int64_t channels) {
  Random random(channels);
  std::vector<float> thresholds(channels);
  for (float& t : thresholds) {
    t = random.pick(
        {-3.0f, -1.5f, -0.0f, 0.0f, 0.25f, 0.5f, 1.0f, 2.0f, 3.5f, kNaN, kInfinity, -kInfinity});
  }
  return thresholds;
}

std::vector<uint8_t> random_bits(const ImageShape& shape, uint64_t seed) {
  reference::Image image(shape);
  Random(seed).fill_signs(image.values);
  return reference::pack(image);
}

std::vector<uint8_t> signs(const ImageShape& shape, uint64_t seed, DataType type, Layout layout) {
  reference::Image image(shape);
  Random(seed).fill_signs(image.values);
  std::vector<float> values(image.values.size());
  for (int64_t n = 0; n < shape.batch; ++n) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t h = 0; h < shape.height; ++h) {
        for (int64_t w = 0; w < shape.width; ++w) {
          values[reference::offset(shape, layout, n, c, h, w)] = image.at(n, c, h, w);
        }
      }
    }
  }
  return reference::encode(type, values);
}

}  // namespace

TEST(PackedBytes, IsSixteenPerStarted128Channels) {
  CHECK_EQ(packed_bytes(1), 16);
  CHECK_EQ(packed_bytes(127), 16);
  CHECK_EQ(packed_bytes(128), 16);
  CHECK_EQ(packed_bytes(129), 32);
  CHECK_EQ(packed_bytes(256), 32);
  CHECK_EQ(packed_bytes(257), 48);
  CHECK_EQ(packed_bytes(4096), 512);
  CHECK_EQ(packed_image_bytes({2, 129, 3, 5}), 2 * 3 * 5 * 32);
  CHECK_EQ(packed_image_bytes({0, 129, 3, 5}), 0);
}

TEST(PackBits, Channel33IsBit1OfByte4) {
  for (const Queue& queue : queues()) {
    std::vector<float> values(130, -1.0f);
    values[33] = 1.0f;
    std::vector<uint8_t> expected(32, 0);
    expected[4] = 0x02;
    CHECK_EQ(pack({1, 130, 1, 1}, reference::encode(DataType::kFloat32, values), DataType::kFloat32,
                  Layout::kNHWC, queue),
             expected);
  }
}

TEST(PackBits, EveryChannelIsItsOwnBitAndUnusedBitsAreZero) {
  for (int64_t channels : kChannelCounts) {
    for (DataType type : kValueTypes) {
      for (Layout layout : kLayouts) {
        // Pixel c has channel c alone at +1.
        const ImageShape shape{1, channels, 1, channels};
        std::vector<float> values(channels * channels, -1.0f);
        for (int64_t c = 0; c < channels; ++c) values[c * channels + c] = 1.0f;
        const int64_t stride = reference::pixel_bytes(channels);
        std::vector<uint8_t> expected(channels * stride, 0);
        for (int64_t c = 0; c < channels; ++c) expected[c * stride + c / 8] = 1 << (c % 8);
        const std::vector<uint8_t> elements = reference::encode(type, values);
        for (const Queue& queue : queues()) {
          CHECK_EQ(pack(shape, elements, type, layout, queue), expected);
        }
      }
    }
  }
}

TEST(PackBits, AllOnesLeaveUnusedBitsZero) {
  for (int64_t channels : kChannelCounts) {
    for (Layout layout : kLayouts) {
      const ImageShape shape{1, channels, 3, 3};
      check_pack(shape, reference::encode(DataType::kInt8, std::vector<float>(9 * channels, 1.0f)),
                 DataType::kInt8, layout);
    }
  }
}

TEST(PackBits, SpecialValuesCompareAsFloat32) {
  const std::vector<float> values = {0.0f,      -0.0f,      kNaN,   -kNaN,   kInfinity, -kInfinity,
                                     kSmallest, -kSmallest, 1e-40f, -1e-40f, 6e-8f,     -6e-8f,
                                     1.0f,      -1.0f,      3e38f,  -3e38f};
  const std::vector<uint8_t> expected_at_zero = {1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0};
  const ImageShape shape{1, static_cast<int64_t>(values.size()), 1, 1};
  for (const Queue& queue : queues()) {
    const std::vector<uint8_t> got = pack(shape, reference::encode(DataType::kFloat32, values),
                                          DataType::kFloat32, Layout::kNHWC, queue);
    for (size_t c = 0; c < values.size(); ++c) {
      const Context context("value " + std::to_string(values[c]) + " of channel " +
                            std::to_string(c));
      CHECK_EQ((got[c / 8] >> (c % 8)) & 1, +expected_at_zero[c]);
    }
  }
  for (DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
    for (float threshold : values) {
      for (Layout layout : kLayouts)
        check_pack(shape, reference::encode(type, values), type, layout, threshold);
    }
  }
}

TEST(PackBits, EveryBitPatternOfTheSmallTypesMatchesReference) {
  for (DataType type : {DataType::kFloat16, DataType::kBFloat16, DataType::kInt8}) {
    const std::vector<uint8_t> elements = reference::all_patterns(type);
    const ImageShape shape =
        type == DataType::kInt8 ? ImageShape{1, 64, 2, 2} : ImageShape{2, 64, 32, 16};
    for (float threshold : {0.0f, -0.0f, 0.1f, -1.0f, 0.5f, 127.0f, -128.0f, 65504.0f, 1e-41f,
                            6e-8f, kInfinity, -kInfinity, kNaN}) {
      for (Layout layout : kLayouts) check_pack(shape, elements, type, layout, threshold);
    }
  }
}

TEST(PackBits, ThresholdPerChannelReplacesTheScalar) {
  for (int64_t channels : {1, 7, 33, 64, 130, 257}) {
    const std::vector<float> thresholds = random_thresholds(channels);
    const ImageShape shape{2, channels, 3, 5};
    for (DataType type : kValueTypes) {
      for (Layout layout : kLayouts) {
        check_pack(shape, random_elements(shape, type, channels), type, layout, 100.0f, thresholds);
      }
    }
  }
}

TEST(PackBits, EveryShapeMatchesReference) {
  for (int64_t channels : kChannelCounts) {
    for (const auto& [batch, height, width] : std::vector<std::array<int64_t, 3>>{
             {1, 1, 1}, {3, 1, 17}, {2, 17, 1}, {2, 7, 7}, {1, 9, 33}, {5, 4, 4}, {1, 13, 64}}) {
      const ImageShape shape{batch, channels, height, width};
      for (DataType type : kValueTypes) {
        for (Layout layout : kLayouts) {
          check_pack(shape, random_elements(shape, type, batch * height), type, layout);
        }
      }
    }
  }
}

TEST(PackBits, AcceptsValuesAlignedToTheirElementOnly) {
  for (Placement placement : {Placement::kStart, Placement::kEnd, Placement::kOffEnd}) {
    for (int64_t channels : {3, 32, 64, 128, 131}) {
      const ImageShape shape{1, channels, 5, 7};
      for (DataType type : kValueTypes) {
        for (Layout layout : kLayouts) {
          check_pack(shape, random_elements(shape, type, 5), type, layout, 1.0f, {}, placement);
        }
      }
    }
  }
}

TEST(PackBits, LargeImageMatchesReference) {
  const ImageShape shape{2, 96, 61, 125};
  for (DataType type : kValueTypes) {
    for (Layout layout : kLayouts) check_pack(shape, random_elements(shape, type, 3), type, layout);
  }
}

TEST(PackBits, EmptyImageWritesNothing) {
  for (const Queue& queue : queues()) {
    for (const ImageShape& shape :
         {ImageShape{0, 33, 4, 4}, ImageShape{2, 33, 0, 4}, ImageShape{2, 33, 4, 0}}) {
      const Buffer packed(queue, 64, 16), x(queue, 64, 16);
      pack_bits(shape, x.data(), DataType::kFloat32, Layout::kNCHW, {}, packed.data(), queue);
      unpack_bits(shape, packed.data(), x.data(), DataType::kFloat32, Layout::kNCHW, queue);
      packed.check_untouched("packed");
      x.check_untouched("x");
      pack_bits(shape, nullptr, DataType::kFloat32, Layout::kNCHW, {}, nullptr, queue);
    }
  }
}

TEST(PackBitsAndClip, EndsAreInsideAndTheNextNumbersAreNot) {
  struct Interval {
    float threshold, limit, low, high;
  };
  for (const auto& [threshold, limit, low, high] :
       std::vector<Interval>{{0.0f, 1.0f, -1.0f, 1.0f},
                             {0.25f, 1.0f, -0.75f, 1.25f},
                             {-3.0f, 0.0f, -3.0f, -3.0f},
                             {0.0f, 0.0f, -0.0f, 0.0f},
                             {-0.0f, kSmallest, -kSmallest, kSmallest},
                             {1.0f, 1.0f, 0.0f, 2.0f},
                             {-1.0f, 1.0f, -2.0f, 0.0f},
                             {1.0f, 0x1p-25f, 1.0f, 1.0f},  // Both ends round to 1.
                             {0x1p25f, 1.0f, 0x1p25f, 0x1p25f},
                             {0.0f, kLargest, -kLargest, kLargest},
                             {3e38f, 3e38f, 0.0f, kInfinity},
                             {-3e38f, 3e38f, -kInfinity, 0.0f},
                             {kInfinity, 3e38f, kInfinity, kInfinity},
                             {-kInfinity, 0.0f, -kInfinity, -kInfinity}}) {
    const float below = std::nextafter(low, -kInfinity), above = std::nextafter(high, kInfinity);
    const std::vector<float> values = {low, high, below, above, kNaN};
    // Nothing is beyond infinity.
    const int expected = 3 | (below == low) << 2 | (above == high) << 3;
    const std::vector<uint8_t> elements = reference::encode(DataType::kFloat32, values);
    for (const Queue& queue : queues()) {
      for (bool is_per_channel : {false, true}) {
        for (Layout layout : kLayouts) {
          const Context context("threshold " + std::to_string(threshold) + ", limit " +
                                std::to_string(limit) + " on " + describe(queue));
          const Buffer x(queue, elements, 4), packed(queue, 16, 16), inside(queue, 16, 16);
          const Buffer thresholds(queue, std::vector<float>(values.size(), threshold), 4);
          pack_bits_and_clip({1, static_cast<int64_t>(values.size()), 1, 1}, x.data(),
                             DataType::kFloat32, layout,
                             {threshold, is_per_channel ? thresholds.as<float>() : nullptr}, limit,
                             packed.data(), inside.data(), queue);
          CHECK_EQ(+inside.read()[0], expected);
        }
      }
    }
  }
}

TEST(PackBitsAndClip, SpecialValuesCompareAsFloat32) {
  for (float threshold : {0.0f, -0.0f, 0.1f, -1.0f, kSmallest, 65504.0f, 3e38f, -3e38f, kInfinity,
                          -kInfinity, kNaN}) {
    for (float limit : {0.0f, -0.0f, kSmallest, 1.0f, 1.3f, 70000.0f, 3e38f, kLargest}) {
      std::vector<float> values = {0.0f,      -0.0f,      kNaN,      -kNaN,
                                   kInfinity, -kInfinity, kSmallest, -kSmallest,
                                   kLargest,  -kLargest,  65504.0f,  -65504.0f};
      for (float end : {reference::sum(threshold, -limit), reference::sum(threshold, limit)}) {
        values.insert(values.end(),
                      {end, std::nextafter(end, kInfinity), std::nextafter(end, -kInfinity)});
      }
      const ImageShape shape{1, static_cast<int64_t>(values.size()), 1, 1};
      const std::vector<float> thresholds(values.size(), threshold);
      for (DataType type : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        const std::vector<uint8_t> elements = reference::encode(type, values);
        for (Layout layout : kLayouts) {
          check_pack_and_clip(shape, elements, type, layout, threshold, limit);
          check_pack_and_clip(shape, elements, type, layout, 100.0f, limit, thresholds);
        }
      }
    }
  }
}

TEST(PackBitsAndClip, EveryBitPatternOfTheSmallTypesMatchesReference) {
  struct Interval {
    float threshold, limit;
  };
  for (DataType type : {DataType::kFloat16, DataType::kBFloat16, DataType::kInt8}) {
    const std::vector<uint8_t> elements = reference::all_patterns(type);
    const ImageShape shape =
        type == DataType::kInt8 ? ImageShape{1, 64, 2, 2} : ImageShape{2, 64, 32, 16};
    for (const auto& [threshold, limit] : std::vector<Interval>{
             {0.0f, 0.0f},      {-0.0f, kSmallest},  {0.0f, 6e-8f},    {6e-8f, 6e-8f},
             {0.0f, 1.0f},      {0.1f, 1.3f},        {-1.0f, 1.0f},    {0.0f, 127.0f},
             {0.0f, 127.5f},    {-0.5f, 127.5f},     {-128.0f, 0.0f},  {127.0f, 0.0f},
             {200.0f, 73.0f},   {-200.0f, 71.9f},    {65504.0f, 1.0f}, {0.0f, 65504.0f},
             {0.0f, 70000.0f},  {-1.0f, 3e38f},      {3e38f, 3e38f},   {-3e38f, kLargest},
             {kInfinity, 1.0f}, {-kInfinity, 3e38f}, {kNaN, kLargest}}) {
      for (Layout layout : kLayouts) {
        check_pack_and_clip(shape, elements, type, layout, threshold, limit);
        check_pack_and_clip(shape, elements, type, layout, 100.0f, limit,
                            std::vector<float>(shape.channels, threshold));
      }
    }
  }
}

TEST(PackBitsAndClip, ThresholdPerChannelReplacesTheScalar) {
  for (int64_t channels : {1, 7, 33, 64, 130, 257}) {
    const std::vector<float> thresholds = random_thresholds(channels);
    const ImageShape shape{2, channels, 3, 5};
    for (DataType type : kValueTypes) {
      for (Layout layout : kLayouts) {
        for (float limit : {0.0f, 1.3f, 1.5f, 3e38f}) {
          check_pack_and_clip(shape, random_elements(shape, type, channels), type, layout, 100.0f,
                              limit, thresholds);
        }
      }
    }
  }
}

TEST(PackBitsAndClip, EveryShapeMatchesReference) {
  for (int64_t channels : kChannelCounts) {
    for (const auto& [batch, height, width] : std::vector<std::array<int64_t, 3>>{
             {1, 1, 1}, {3, 1, 17}, {2, 17, 1}, {2, 7, 7}, {1, 9, 33}, {5, 4, 4}, {1, 13, 64}}) {
      const ImageShape shape{batch, channels, height, width};
      for (DataType type : kValueTypes) {
        for (Layout layout : kLayouts) {
          check_pack_and_clip(shape, random_elements(shape, type, batch * height), type, layout,
                              0.5f, 1.5f);
        }
      }
    }
  }
}

TEST(PackBitsAndClip, AllInsideLeaveUnusedBitsZero) {
  for (int64_t channels : kChannelCounts) {
    const ImageShape shape{1, channels, 3, 3};
    for (DataType type : kValueTypes) {
      for (Layout layout : kLayouts) {
        check_pack_and_clip(shape, random_elements(shape, type, channels), type, layout, -1.0f,
                            3e38f);
      }
    }
  }
}

TEST(PackBitsAndClip, AcceptsValuesAlignedToTheirElementOnly) {
  for (Placement placement : {Placement::kStart, Placement::kEnd, Placement::kOffEnd}) {
    for (int64_t channels : {3, 32, 64, 128, 131}) {
      const ImageShape shape{1, channels, 5, 7};
      std::vector<float> thresholds(channels);
      for (int64_t c = 0; c < channels; ++c) thresholds[c] = static_cast<float>(c % 5 - 2);
      for (DataType type : kValueTypes) {
        const std::vector<uint8_t> elements = random_elements(shape, type, 5);
        for (Layout layout : kLayouts) {
          check_pack_and_clip(shape, elements, type, layout, 1.0f, 1.0f, {}, placement);
          check_pack_and_clip(shape, elements, type, layout, 1.0f, 1.0f, thresholds, placement);
        }
      }
    }
  }
}

TEST(PackBitsAndClip, LargeImageMatchesReference) {
  const ImageShape shape{2, 96, 61, 125};
  for (DataType type : kValueTypes) {
    for (Layout layout : kLayouts) {
      check_pack_and_clip(shape, random_elements(shape, type, 3), type, layout, -0.5f, 1.5f);
    }
  }
}

TEST(PackBitsAndClip, EmptyImageWritesNothing) {
  for (const Queue& queue : queues()) {
    for (const ImageShape& shape :
         {ImageShape{0, 33, 4, 4}, ImageShape{2, 33, 0, 4}, ImageShape{2, 33, 4, 0}}) {
      const Buffer packed(queue, 64, 16), inside(queue, 64, 16), x(queue, 64, 16);
      pack_bits_and_clip(shape, x.data(), DataType::kFloat32, Layout::kNCHW, {}, 1.0f,
                         packed.data(), inside.data(), queue);
      packed.check_untouched("packed");
      inside.check_untouched("inside");
      pack_bits_and_clip(shape, nullptr, DataType::kFloat32, Layout::kNCHW, {}, 1.0f, nullptr,
                         nullptr, queue);
    }
  }
}

TEST(UnpackBits, GivesPlusOneAndMinusOneForEveryShape) {
  for (int64_t channels : kChannelCounts) {
    for (const auto& [batch, height, width] :
         std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {3, 1, 17}, {2, 7, 7}, {1, 13, 64}}) {
      const ImageShape shape{batch, channels, height, width};
      for (DataType type : kValueTypes) {
        for (Layout layout : kLayouts) {
          for (Placement placement : {Placement::kEnd, Placement::kOffEnd}) {
            for (const Queue& queue : queues()) {
              const std::vector<uint8_t> got =
                  unpack(shape, random_bits(shape, channels), type, layout, queue, placement);
              const Context context(describe_image(shape, type, layout) + " on " + describe(queue));
              CHECK_EQ(got, signs(shape, channels, type, layout));
            }
          }
        }
      }
    }
  }
}

TEST(UnpackBits, PackingTheResultGivesTheBitsBack) {
  const ImageShape shape{2, 200, 19, 23};
  const std::vector<uint8_t> bits = random_bits(shape, 7);
  for (const Queue& queue : queues()) {
    for (DataType type : kValueTypes) {
      for (Layout layout : kLayouts) {
        CHECK_EQ(pack(shape, unpack(shape, bits, type, layout, queue), type, layout, queue), bits);
      }
    }
  }
}

}  // namespace binconv::test
