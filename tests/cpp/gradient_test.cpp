#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "device.h"
#include "random.h"
#include "reference.h"
#include "test.h"

namespace binconv::test {
namespace {

constexpr Placement kPlacements[] = {Placement::kStart, Placement::kEnd, Placement::kOffEnd};
constexpr int64_t kChannelCounts[] = {1, 7, 8, 9, 13, 31, 33, 64, 100, 128, 130, 257};
constexpr int64_t kRowCounts[] = {0, 1, 3, 8, 17, 64};
constexpr int64_t kColumnCounts[] = {0, 1, 5, 8, 9, 72, 577};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kSmallest = std::numeric_limits<float>::denorm_min();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int64_t kTwo31 = int64_t{1} << 31;
constexpr int64_t kTwo62 = int64_t{1} << 62;
constexpr int64_t kLowest = std::numeric_limits<int64_t>::min();
constexpr int64_t kHighest = std::numeric_limits<int64_t>::max();
constexpr Status kInvalid = Status::kInvalidArgument;

// Zeros, what is not finite, denormals of each type, and what the half types must round.
const std::vector<float>& special_values() {
  static const std::vector<float> values = {
      0.0f,       -0.0f,    kNaN,      -kNaN,   kInfinity, -kInfinity, kSmallest,
      -kSmallest, 1e-40f,   -1e-40f,   6e-8f,   -6e-8f,    3.0e-8f,    1e-30f,
      1.0f,       -1.0f,    1.0f / 3,  -0.1f,   1.3f,      -1.3f,      257.0f,
      2049.0f,    65504.0f, -65520.0f, 1.0e38f, -1.0e38f,  kLargest,   -kLargest};
  return values;
}

std::vector<uint8_t> random_bytes(int64_t count, uint64_t seed) {
  Random random(seed);
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits() >> 32);
  return bytes;
}

// Special values and any bit patterns, every NaN among them.
std::vector<uint8_t> random_elements(int64_t count, DataType type, uint64_t seed) {
  std::vector<uint8_t> elements = random_bytes(count * reference::element_bytes(type), seed);
  if (type == DataType::kInt8) return elements;
  Random random(seed + 1);
  const std::vector<float>& specials = special_values();
  for (int64_t i = 0; i < count; ++i) {
    if (random.one_in(3)) continue;
    float x = random.uniform(-2.0f, 2.0f);
    if (random.one_in(2)) x = specials[random.between(0, specials.size() - 1)];
    reference::store(type, elements.data(), i, x);
  }
  return elements;
}

int64_t pixel_count(const ImageShape& s) { return s.batch * s.height * s.width; }

int64_t needed_bytes(int64_t channels) { return (channels + 7) / 8; }

// The distances from pixel to pixel to test: nothing between them, those of packed bits, and one
// that keeps no alignment.
std::array<int64_t, 3> pixel_strides(int64_t channels) {
  return {needed_bytes(channels), reference::pixel_bytes(channels), needed_bytes(channels) + 3};
}

using ImageFunction = void (*)(const ImageShape&, const void*, int64_t, void*, DataType, Layout,
                               const Queue&);

// A call of sign_values or mask_values. `bits` has `lead` bytes before the first pixel.
struct ImageCall {
  ImageFunction function;
  ImageShape shape;
  int64_t pixel_bytes;
  DataType type;
  Layout layout;
  std::vector<uint8_t> bits;
  std::vector<uint8_t> elements = {};  // Of x before the call; none: what the call overwrites.
  int64_t lead = 0;
  Placement placement = Placement::kEnd;
};

std::vector<uint8_t> expected_image(const ImageCall& call) {
  const ImageShape& s = call.shape;
  const int64_t bytes = reference::element_bytes(call.type);
  std::vector<uint8_t> expected(reference::element_count(s) * bytes);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t h = 0; h < s.height; ++h) {
        for (int64_t w = 0; w < s.width; ++w) {
          const int64_t pixel = (n * s.height + h) * s.width + w;
          const int byte = call.bits[call.lead + pixel * call.pixel_bytes + c / 8];
          const bool is_one = byte >> (c % 8) & 1;
          const int64_t i = reference::offset(s, call.layout, n, c, h, w);
          if (call.elements.empty()) {
            reference::store(call.type, expected.data(), i, is_one ? 1.0f : -1.0f);
          } else if (is_one) {
            std::memcpy(&expected[i * bytes], &call.elements[i * bytes], bytes);
          }
        }
      }
    }
  }
  return expected;
}

void check_image(const ImageCall& call) {
  const ImageShape& s = call.shape;
  const std::vector<uint8_t> expected = expected_image(call);
  for (const Queue& queue : queues()) {
    const Context context("image of batch " + std::to_string(s.batch) + ", channels " +
                          std::to_string(s.channels) + ", " + std::to_string(s.height) + "x" +
                          std::to_string(s.width) + ", " + reference::type_name(call.type) +
                          (call.layout == Layout::kNCHW ? ", NCHW" : ", NHWC") + ", pixel_bytes " +
                          std::to_string(call.pixel_bytes) + ", lead " + std::to_string(call.lead) +
                          " on " + describe(queue));
    run_guarded([&] {
      const int64_t alignment = reference::element_bytes(call.type);
      const Buffer bits(queue, call.bits, 1, call.placement);
      Buffer x(queue, static_cast<int64_t>(expected.size()), alignment, call.placement);
      if (!call.elements.empty()) x.write(call.elements.data());
      // mask_values gives on its own result the same.
      for (int repeat = 0; repeat < 2; ++repeat) {
        call.function(s, bits.as<uint8_t>() + call.lead, call.pixel_bytes, x.data(), call.type,
                      call.layout, queue);
        CHECK_EQ(x.read(), expected);
      }
      x.check_guards("x");
      bits.check_unchanged("bits");
    });
  }
}

// The call on random bits, the unused ones among them, and for mask_values on random x.
void check_random_image(ImageFunction function, const ImageShape& shape, int64_t pixel_bytes,
                        DataType type, Layout layout, int64_t lead = 0,
                        Placement placement = Placement::kEnd) {
  ImageCall call{
      function, shape,  pixel_bytes,
      type,     layout, random_bytes(lead + pixel_count(shape) * pixel_bytes, shape.channels)};
  if (function == mask_values) {
    call.elements = random_elements(reference::element_count(shape), type, shape.channels);
  }
  call.lead = lead;
  call.placement = placement;
  check_image(call);
}

void check_every_shape(ImageFunction function) {
  for (int64_t channels : kChannelCounts) {
    for (const auto& [batch, height, width] : std::vector<std::array<int64_t, 3>>{
             {1, 1, 1}, {2, 3, 5}, {1, 7, 7}, {3, 1, 8}, {2, 4, 4}, {1, 16, 1}}) {
      for (int64_t pixel_bytes : pixel_strides(channels)) {
        for (DataType type : kFloatTypes) {
          for (Layout layout : kLayouts) {
            check_random_image(function, {batch, channels, height, width}, pixel_bytes, type,
                               layout);
          }
        }
      }
    }
  }
}

void check_every_alignment(ImageFunction function) {
  for (int64_t channels : {1, 8, 9, 33, 64, 128, 130}) {
    for (int64_t pixel_bytes : pixel_strides(channels)) {
      for (int64_t lead : {0, 1, 2, 3}) {
        for (Placement placement : kPlacements) {
          for (DataType type : kFloatTypes) {
            for (Layout layout : kLayouts) {
              check_random_image(function, {1, channels, 3, 5}, pixel_bytes, type, layout, lead,
                                 placement);
            }
          }
        }
      }
    }
  }
}

// The bits that no channel has, all 0 and all 1.
void check_unused_bits(ImageFunction function) {
  for (int64_t channels : kChannelCounts) {
    const ImageShape shape{2, channels, 3, 3};
    for (int64_t pixel_bytes : pixel_strides(channels)) {
      const std::vector<uint8_t> bits = random_bytes(pixel_count(shape) * pixel_bytes, channels);
      std::vector<uint8_t> used(bits.size());
      for (int64_t pixel = 0; pixel < pixel_count(shape); ++pixel) {
        for (int64_t c = 0; c < channels; ++c) {
          used[pixel * pixel_bytes + c / 8] |= 1 << (c % 8);
        }
      }
      std::vector<uint8_t> zeros(bits), ones(bits);
      for (size_t i = 0; i < bits.size(); ++i) {
        zeros[i] &= used[i];
        ones[i] |= ~used[i];
      }
      for (DataType type : kFloatTypes) {
        for (Layout layout : kLayouts) {
          ImageCall call{function, shape, pixel_bytes, type, layout, {}};
          if (function == mask_values) {
            call.elements = random_elements(reference::element_count(shape), type, channels);
          }
          call.bits = zeros;
          const std::vector<uint8_t> expected = expected_image(call);
          check_image(call);
          call.bits = ones;
          CHECK_EQ(expected_image(call), expected);
          check_image(call);
        }
      }
    }
  }
}

// What follows the last channel's byte of the last pixel is not read, so it need not be there.
void check_cut_bits(ImageFunction function) {
  for (int64_t channels : kChannelCounts) {
    const ImageShape shape{1, channels, 3, 5};
    for (int64_t pixel_bytes : pixel_strides(channels)) {
      for (DataType type : kFloatTypes) {
        for (Layout layout : kLayouts) {
          ImageCall call{
              function,
              shape,
              pixel_bytes,
              type,
              layout,
              random_bytes((pixel_count(shape) - 1) * pixel_bytes + needed_bytes(channels),
                           channels)};
          if (function == mask_values) {
            call.elements = random_elements(reference::element_count(shape), type, channels);
          }
          check_image(call);
        }
      }
    }
  }
}

void check_large_image(ImageFunction function) {
  const ImageShape shape{2, 100, 61, 65};
  for (DataType type : kFloatTypes) {
    for (Layout layout : kLayouts) {
      check_random_image(function, shape, needed_bytes(100), type, layout);
    }
  }
}

void check_empty_image(ImageFunction function) {
  for (const Queue& queue : queues()) {
    for (const ImageShape& shape :
         {ImageShape{0, 33, 4, 4}, ImageShape{2, 33, 0, 4}, ImageShape{2, 33, 4, 0}}) {
      const Buffer bits(queue, 64, 1), x(queue, 64, 16);
      function(shape, bits.data(), 5, x.data(), DataType::kFloat32, Layout::kNCHW, queue);
      function(shape, nullptr, 5, nullptr, DataType::kFloat16, Layout::kNHWC, queue);
      bits.check_untouched("bits");
      x.check_untouched("x");
    }
  }
}

// Factors for the rows: those that float16 or bfloat16 must round, negative ones, special ones.
std::vector<float> row_scales(int64_t rows) {
  const std::vector<float> some = {0.1f,   -1.0f / 3, 1.0009766f, kInfinity, 2.0f,   kNaN,
                                   0.0f,   -0.0f,     65519.0f,   65520.0f,  1e-42f, -3.0e-8f,
                                   257.0f, 2049.0f,   -kInfinity, 1e38f,     -0.7f};
  std::vector<float> scale(rows);
  for (int64_t r = 0; r < rows; ++r) scale[r] = some[r % some.size()];
  return scale;
}

std::string describe_rows(int64_t rows, int64_t columns) {
  return "rows " + std::to_string(rows) + ", columns " + std::to_string(columns);
}

void check_elements(DataType type, const std::vector<uint8_t>& got,
                    const std::vector<uint8_t>& expected) {
  const int64_t bytes = reference::element_bytes(type);
  CHECK_EQ(got.size(), expected.size());
  for (int64_t i = 0; i < static_cast<int64_t>(expected.size()) / bytes; ++i) {
    if (reference::same_element(type, got.data(), expected.data(), i)) continue;
    std::ostringstream message;
    message.precision(9);
    message << "got " << reference::load(type, got.data(), i) << ", expected "
            << reference::load(type, expected.data(), i) << " at element " << i;
    report_failure(__FILE__, __LINE__, message.str());
    return;
  }
}

// An empty `scale` is a null one.
void check_scaled_signs(int64_t rows, int64_t columns, const std::vector<uint8_t>& weight,
                        DataType weight_type, const std::vector<float>& scale, DataType out_type,
                        Placement placement = Placement::kEnd) {
  const int64_t out_bytes = reference::element_bytes(out_type);
  std::vector<uint8_t> expected(rows * columns * out_bytes);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float factor = scale.empty() ? 1.0f : scale[i / columns];
    const bool is_positive = reference::load(weight_type, weight.data(), i) >= 0;
    reference::store(out_type, expected.data(), i, is_positive ? factor : -factor);
  }
  for (const Queue& queue : queues()) {
    const Context context(describe_rows(rows, columns) + ", " + reference::type_name(weight_type) +
                          " to " + reference::type_name(out_type) +
                          (scale.empty() ? ", no scale on " : " on ") + describe(queue));
    run_guarded([&] {
      const Buffer weights(queue, weight, reference::element_bytes(weight_type), placement);
      const Buffer scales(queue, scale, 4, placement);
      const Buffer out(queue, rows * columns * out_bytes, out_bytes, placement);
      const auto run = [&] {
        scaled_signs(rows, columns, weights.data(), weight_type,
                     scale.empty() ? nullptr : scales.as<float>(), out.data(), out_type, queue);
        return out.read();
      };
      const std::vector<uint8_t> got = run();
      check_elements(out_type, got, expected);
      CHECK_EQ(run(), got);
      out.check_guards("out");
      weights.check_unchanged("weight");
      scales.check_unchanged("scale");
    });
  }
}

// A call of weight_gradient; an empty `scale` is a null one.
struct GradientCall {
  int64_t rows, columns;
  DataType gradient_type, weight_type, out_type;
  std::vector<uint8_t> gradient, weight;
  std::vector<float> scale;
  float limit;
  Placement placement = Placement::kEnd;
};

bool passes(float weight, float limit) {
  return std::isinf(limit) || (-limit <= weight && weight <= limit);
}

std::vector<uint8_t> expected_gradient(const GradientCall& call) {
  const int64_t count = call.rows * call.columns;
  std::vector<uint8_t> expected(count * reference::element_bytes(call.out_type));
  for (int64_t i = 0; i < count; ++i) {
    float y = 0.0f;
    if (passes(reference::load(call.weight_type, call.weight.data(), i), call.limit)) {
      const float factor = call.scale.empty() ? 1.0f : call.scale[i / call.columns];
      y = reference::product(factor, reference::load(call.gradient_type, call.gradient.data(), i));
    }
    reference::store(call.out_type, expected.data(), i, y);
  }
  return expected;
}

void check_gradient(const GradientCall& call) {
  const std::vector<uint8_t> expected = expected_gradient(call);
  for (const Queue& queue : queues()) {
    const Context context(describe_rows(call.rows, call.columns) + ", gradient " +
                          reference::type_name(call.gradient_type) + ", weight " +
                          reference::type_name(call.weight_type) + " to " +
                          reference::type_name(call.out_type) + ", limit " +
                          std::to_string(call.limit) + (call.scale.empty() ? ", no scale" : "") +
                          " on " + describe(queue));
    run_guarded([&] {
      const Buffer gradient(queue, call.gradient, reference::element_bytes(call.gradient_type),
                            call.placement);
      const Buffer weight(queue, call.weight, reference::element_bytes(call.weight_type),
                          call.placement);
      const Buffer scale(queue, call.scale, 4, call.placement);
      const Buffer out(queue, static_cast<int64_t>(expected.size()),
                       reference::element_bytes(call.out_type), call.placement);
      const auto run = [&] {
        weight_gradient(call.rows, call.columns, gradient.data(), call.gradient_type, weight.data(),
                        call.weight_type, call.scale.empty() ? nullptr : scale.as<float>(),
                        call.limit, out.data(), call.out_type, queue);
        return out.read();
      };
      const std::vector<uint8_t> got = run();
      check_elements(call.out_type, got, expected);
      CHECK_EQ(run(), got);
      out.check_guards("out");
      gradient.check_unchanged("gradient");
      weight.check_unchanged("weight");
      scale.check_unchanged("scale");
    });
  }
}

GradientCall random_gradient(int64_t rows, int64_t columns, DataType gradient_type,
                             DataType weight_type, DataType out_type, bool has_scale, float limit) {
  return {rows,
          columns,
          gradient_type,
          weight_type,
          out_type,
          random_elements(rows * columns, gradient_type, rows + columns),
          random_elements(rows * columns, weight_type, rows * columns),
          has_scale ? row_scales(rows) : std::vector<float>(),
          limit};
}

// The results as float32 of one row with gradient, weight and out of float32.
std::vector<float> run_float_gradient(const std::vector<float>& gradient,
                                      const std::vector<float>& weight, float limit,
                                      const Queue& queue) {
  const int64_t columns = static_cast<int64_t>(gradient.size());
  const Buffer gradients(queue, gradient, 4), weights(queue, weight, 4), out(queue, 4 * columns, 4);
  weight_gradient(1, columns, gradients.data(), DataType::kFloat32, weights.data(),
                  DataType::kFloat32, nullptr, limit, out.data(), DataType::kFloat32, queue);
  out.check_guards("out");
  return out.read_as<float>();
}

void* beyond(void* pointer, int64_t bytes) { return static_cast<uint8_t*>(pointer) + bytes; }

std::string text(int64_t value) { return std::to_string(value); }

constexpr DataType kNoFloatTypes[] = {DataType::kInt8, DataType::kInt32, DataType::kBits};

}  // namespace

TEST(SignValues, Channel33IsBit1OfByte4) {
  for (const Queue& queue : queues()) {
    const Buffer bits(queue, std::vector<uint8_t>{0, 0, 0, 0, 2}, 1), x(queue, 4 * 40, 4);
    sign_values({1, 40, 1, 1}, bits.data(), 5, x.data(), DataType::kFloat32, Layout::kNHWC, queue);
    std::vector<float> expected(40, -1.0f);
    expected[33] = 1.0f;
    CHECK_EQ(x.read_as<float>(), expected);
  }
}

TEST(SignValues, EveryShapeMatchesReference) { check_every_shape(sign_values); }

TEST(SignValues, AcceptsBitsOfAnyAlignmentAndValuesAlignedToTheirElementOnly) {
  check_every_alignment(sign_values);
}

TEST(SignValues, BitsBeyondTheLastChannelDoNotMatter) { check_unused_bits(sign_values); }

TEST(SignValues, ReadsNoByteBeyondTheLastChannelOfTheLastPixel) { check_cut_bits(sign_values); }

TEST(SignValues, LargeImageMatchesReference) { check_large_image(sign_values); }

TEST(SignValues, EmptyImageWritesNothing) { check_empty_image(sign_values); }

TEST(MaskValues, KeepsEveryValueWhereTheBitIs1AndWritesPositiveZeroElsewhere) {
  const std::vector<float> values = {kNaN, kInfinity, -kInfinity, -0.0f, 0.0f, -1.5f, -kSmallest};
  const int64_t count = static_cast<int64_t>(values.size());
  for (const Queue& queue : queues()) {
    for (DataType type : kFloatTypes) {
      for (Layout layout : kLayouts) {
        const std::vector<uint8_t> elements = reference::encode(type, values);
        for (uint8_t byte : {0x00, 0x80, 0x7f, 0xff}) {
          const bool is_one = byte & 1;
          const Buffer bits(queue, std::vector<uint8_t>{byte}, 1);
          const Buffer x(queue, elements, reference::element_bytes(type));
          mask_values({1, count, 1, 1}, bits.data(), 1, x.data(), type, layout, queue);
          CHECK_EQ(x.read(), is_one ? elements : std::vector<uint8_t>(elements.size(), 0));
        }
      }
    }
  }
}

TEST(MaskValues, EveryShapeMatchesReference) { check_every_shape(mask_values); }

TEST(MaskValues, AcceptsBitsOfAnyAlignmentAndValuesAlignedToTheirElementOnly) {
  check_every_alignment(mask_values);
}

TEST(MaskValues, BitsBeyondTheLastChannelDoNotMatter) { check_unused_bits(mask_values); }

TEST(MaskValues, ReadsNoByteBeyondTheLastChannelOfTheLastPixel) { check_cut_bits(mask_values); }

TEST(MaskValues, EveryBitPatternOfTheSmallTypesIsKeptOrZero) {
  const ImageShape shape{2, 64, 32, 16};
  for (DataType type : {DataType::kFloat16, DataType::kBFloat16}) {
    for (Layout layout : kLayouts) {
      check_image({mask_values, shape, 8, type, layout, random_bytes(pixel_count(shape) * 8, 9),
                   reference::all_patterns(type)});
    }
  }
}

TEST(MaskValues, LargeImageMatchesReference) { check_large_image(mask_values); }

TEST(MaskValues, EmptyImageWritesNothing) { check_empty_image(mask_values); }

TEST(MaskValues, TakesTheBitsOfPackBitsAndClip) {
  const ImageShape shape{2, 37, 3, 5};
  const int64_t count = reference::element_count(shape);
  for (const Queue& queue : queues()) {
    for (Layout layout : kLayouts) {
      std::vector<float> values(count), expected_signs(count), expected(count);
      Random random(4);
      for (int64_t i = 0; i < count; ++i) {
        values[i] = random.uniform(-2.0f, 2.0f);
        expected_signs[i] = values[i] >= 0 ? 1.0f : -1.0f;
        expected[i] = std::fabs(values[i]) <= 1 ? 3.0f : 0.0f;
      }
      const Buffer x(queue, values, 4), gradient(queue, std::vector<float>(count, 3.0f), 4);
      const Buffer signs(queue, 4 * count, 4);
      const int64_t pixel_bytes = reference::pixel_bytes(shape.channels);
      const Buffer packed(queue, pixel_count(shape) * pixel_bytes, 16);
      const Buffer inside(queue, pixel_count(shape) * pixel_bytes, 16);
      pack_bits_and_clip(shape, x.data(), DataType::kFloat32, layout, {}, 1.0f, packed.data(),
                         inside.data(), queue);
      sign_values(shape, packed.data(), pixel_bytes, signs.data(), DataType::kFloat32, layout,
                  queue);
      mask_values(shape, inside.data(), pixel_bytes, gradient.data(), DataType::kFloat32, layout,
                  queue);
      CHECK_EQ(signs.read_as<float>(), expected_signs);
      CHECK_EQ(gradient.read_as<float>(), expected);
    }
  }
}

TEST(ScaledSigns, ZerosArePositiveAndNaNIsNegative) {
  const std::vector<float> values = {0.0f,       -0.0f,     kNaN,       -kNaN, kSmallest,
                                     -kSmallest, kInfinity, -kInfinity, 2.0f,  -2.0f};
  const std::vector<float> expected = {1, 1, -1, -1, 1, -1, 1, -1, 1, -1};
  const int64_t count = static_cast<int64_t>(values.size());
  for (const Queue& queue : queues()) {
    const Buffer weight(queue, values, 4), out(queue, 4 * count, 4);
    scaled_signs(1, count, weight.data(), DataType::kFloat32, nullptr, out.data(),
                 DataType::kFloat32, queue);
    CHECK_EQ(out.read_as<float>(), expected);
  }
}

TEST(ScaledSigns, EverySizeMatchesReference) {
  for (int64_t rows : kRowCounts) {
    for (int64_t columns : kColumnCounts) {
      for (DataType weight_type : kValueTypes) {
        const std::vector<uint8_t> weight =
            random_elements(rows * columns, weight_type, rows + columns);
        for (DataType out_type : kFloatTypes) {
          check_scaled_signs(rows, columns, weight, weight_type, {}, out_type);
          check_scaled_signs(rows, columns, weight, weight_type, row_scales(rows), out_type);
        }
      }
    }
  }
}

TEST(ScaledSigns, EveryWeightOfTheSmallTypesMatchesReference) {
  for (DataType weight_type : {DataType::kFloat16, DataType::kBFloat16, DataType::kInt8}) {
    const int64_t columns = weight_type == DataType::kInt8 ? 16 : 4096;
    for (DataType out_type : kFloatTypes) {
      check_scaled_signs(16, columns, reference::all_patterns(weight_type), weight_type,
                         row_scales(16), out_type);
    }
  }
}

TEST(ScaledSigns, RoundsEverySpecialScaleOnce) {
  const std::vector<float>& specials = special_values();
  const int64_t rows = static_cast<int64_t>(specials.size());
  std::vector<float> scale = specials;
  // Ties of float16 and bfloat16, and what is next to them.
  for (float tie : {1.0f + 0x1p-11f, 1.0f + 0x3p-11f, 1.0f + 0x1p-8f, 1.0f + 0x3p-8f, 0x1p-25f,
                    0x3p-25f, 65520.0f, 0x1.ffp127f}) {
    scale.insert(scale.end(),
                 {tie, std::nextafter(tie, kInfinity), std::nextafter(tie, -kInfinity)});
  }
  for (DataType out_type : kFloatTypes) {
    const int64_t count = static_cast<int64_t>(scale.size());
    std::vector<float> values;
    for (int64_t r = 0; r < count; ++r) {
      values.insert(values.end(), specials.begin(), specials.end());
    }
    check_scaled_signs(count, rows, reference::encode(DataType::kFloat32, values),
                       DataType::kFloat32, scale, out_type);
  }
}

TEST(ScaledSigns, AcceptsArraysAlignedToTheirElementOnly) {
  for (Placement placement : kPlacements) {
    for (const auto& [rows, columns] :
         std::vector<std::pair<int64_t, int64_t>>{{3, 5}, {1, 64}, {5, 72}}) {
      for (DataType weight_type : kValueTypes) {
        for (DataType out_type : kFloatTypes) {
          check_scaled_signs(rows, columns, random_elements(rows * columns, weight_type, 6),
                             weight_type, row_scales(rows), out_type, placement);
        }
      }
    }
  }
}

TEST(ScaledSigns, LargeWeightMatchesReference) {
  const int64_t rows = 130, columns = 1153;
  for (DataType type : kValueTypes) {
    check_scaled_signs(rows, columns, random_elements(rows * columns, type, 8), type,
                       row_scales(rows), DataType::kBFloat16);
  }
}

TEST(ScaledSigns, NoValuesWriteNothing) {
  for (const Queue& queue : queues()) {
    for (const auto& [rows, columns] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 5}, {5, 0}, {0, 0}}) {
      const Buffer weight(queue, 64, 4), scale(queue, 64, 4), out(queue, 64, 4);
      scaled_signs(rows, columns, weight.data(), DataType::kFloat32, scale.as<float>(), out.data(),
                   DataType::kFloat16, queue);
      scaled_signs(rows, columns, nullptr, DataType::kInt8, nullptr, nullptr, DataType::kFloat32,
                   queue);
      out.check_untouched("out");
    }
  }
}

TEST(WeightGradient, LimitPassesAndTheNextNumberDoesNot) {
  for (float limit : {0.0f, -0.0f, kSmallest, 1.0f, 1.3f, 65504.0f, kLargest}) {
    const float above = std::nextafter(limit, kInfinity);
    for (const Queue& queue : queues()) {
      const Context context("limit " + std::to_string(limit) + " on " + describe(queue));
      CHECK_EQ(run_float_gradient({1, 2, 3, 4, 5, 6}, {limit, -limit, above, -above, 0, -0.0f},
                                  limit, queue),
               (std::vector<float>{1, 2, 0, 0, 5, 6}));
    }
  }
}

TEST(WeightGradient, EveryWeightPassesAnInfiniteLimitAndNoNaNAFiniteOne) {
  const std::vector<float> weight = {kNaN, -kNaN, kInfinity, -kInfinity, kLargest};
  for (const Queue& queue : queues()) {
    CHECK_EQ(run_float_gradient({1, 2, 3, 4, 5}, weight, kInfinity, queue),
             (std::vector<float>{1, 2, 3, 4, 5}));
    CHECK_EQ(run_float_gradient({1, 2, 3, 4, 5}, weight, kLargest, queue),
             (std::vector<float>{0, 0, 0, 0, 5}));
  }
}

TEST(WeightGradient, MaskedGradientsAreAllPositiveZero) {
  const std::vector<float> gradient = {kNaN, -kNaN, kInfinity, -kInfinity, -0.0f, -1.0f, 1.0f};
  const int64_t count = static_cast<int64_t>(gradient.size());
  for (DataType type : kFloatTypes) {
    for (DataType weight_type : kValueTypes) {
      for (float scale : {1.0f, -1.0f, kNaN, kInfinity, -0.0f}) {
        for (const Queue& queue : queues()) {
          const Buffer gradients(queue, reference::encode(type, gradient), 4);
          const Buffer weights(queue,
                               reference::encode(weight_type, std::vector<float>(count, -2.0f)), 4);
          const Buffer scales(queue, std::vector<float>{scale}, 4);
          const Buffer out(queue, count * reference::element_bytes(type), 4);
          weight_gradient(1, count, gradients.data(), type, weights.data(), weight_type,
                          scales.as<float>(), 1.0f, out.data(), type, queue);
          CHECK_EQ(out.read(), std::vector<uint8_t>(out.bytes(), 0));
        }
      }
    }
  }
}

TEST(WeightGradient, OutMayBeTheGradientItself) {
  for (const Queue& queue : queues()) {
    const Buffer gradient(queue, std::vector<float>{1, 2, 3, 4}, 4);
    const Buffer weight(queue, std::vector<float>{0, 2, -1, -2}, 4);
    const Buffer scale(queue, std::vector<float>{2, -3}, 4);
    weight_gradient(2, 2, gradient.data(), DataType::kFloat32, weight.data(), DataType::kFloat32,
                    scale.as<float>(), 1.0f, gradient.data(), DataType::kFloat32, queue);
    CHECK_EQ(gradient.read_as<float>(), (std::vector<float>{2, 0, -9, 0}));
  }
}

TEST(WeightGradient, EveryCombinationOfTypesMatchesReference) {
  for (DataType gradient_type : kFloatTypes) {
    for (DataType weight_type : kValueTypes) {
      for (DataType out_type : kFloatTypes) {
        for (const auto& [rows, columns] :
             std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 5}, {1, 64}, {8, 9}, {17, 72}}) {
          for (float limit : {0.0f, 1.0f, 1.3f, kLargest, kInfinity}) {
            for (bool has_scale : {false, true}) {
              check_gradient(random_gradient(rows, columns, gradient_type, weight_type, out_type,
                                             has_scale, limit));
            }
          }
        }
      }
    }
  }
}

TEST(WeightGradient, EverySizeMatchesReference) {
  for (int64_t rows : kRowCounts) {
    for (int64_t columns : kColumnCounts) {
      check_gradient(random_gradient(rows, columns, DataType::kFloat32, DataType::kFloat32,
                                     DataType::kFloat32, true, 1.0f));
      check_gradient(random_gradient(rows, columns, DataType::kFloat16, DataType::kFloat32,
                                     DataType::kFloat32, true, 1.3f));
      check_gradient(random_gradient(rows, columns, DataType::kBFloat16, DataType::kBFloat16,
                                     DataType::kBFloat16, false, 1.0f));
      check_gradient(random_gradient(rows, columns, DataType::kFloat16, DataType::kInt8,
                                     DataType::kFloat16, true, 64.0f));
    }
  }
}

TEST(WeightGradient, EveryWeightOfTheSmallTypesMatchesReference) {
  for (DataType weight_type : {DataType::kFloat16, DataType::kBFloat16, DataType::kInt8}) {
    const int64_t rows = 16, columns = weight_type == DataType::kInt8 ? 16 : 4096;
    GradientCall call{
        rows,
        columns,
        DataType::kFloat32,
        weight_type,
        DataType::kFloat32,
        reference::encode(DataType::kFloat32, std::vector<float>(rows * columns, -3.0f)),
        reference::all_patterns(weight_type),
        {},
        0.0f};
    for (float limit : {0.0f, kSmallest, 6e-8f, 0.1f, 1.0f, 1.3f, 127.0f, 127.5f, 128.0f, 65504.0f,
                        65505.0f, 1e38f, kLargest, kInfinity}) {
      call.limit = limit;
      check_gradient(call);
    }
  }
}

TEST(WeightGradient, EverySpecialProductMatchesReference) {
  const std::vector<float>& specials = special_values();
  const int64_t count = static_cast<int64_t>(specials.size());
  std::vector<float> gradient;
  for (int64_t r = 0; r < count; ++r) {
    gradient.insert(gradient.end(), specials.begin(), specials.end());
  }
  const std::vector<uint8_t> weight(count * count, 1);
  for (DataType gradient_type : kFloatTypes) {
    for (DataType out_type : kFloatTypes) {
      for (float limit : {1.0f, kInfinity}) {
        check_gradient({count, count, gradient_type, DataType::kInt8, out_type,
                        reference::encode(gradient_type, gradient), weight, specials, limit});
      }
    }
  }
}

TEST(WeightGradient, ProductIsRoundedToFloat32AndThenToTheResult) {
  // In float32 these products are ties of float16 or bfloat16; exactly, most are not.
  for (const auto& [out_type, tie] :
       std::vector<std::pair<DataType, float>>{{DataType::kFloat16, 1.0f + 0x1p-11f},
                                               {DataType::kFloat16, 1.0f + 0x3p-11f},
                                               {DataType::kBFloat16, 1.0f + 0x1p-8f},
                                               {DataType::kBFloat16, 1.0f + 0x3p-8f}}) {
    std::vector<float> gradient, scale;
    Random random(5);
    int64_t inexact = 0;
    while (gradient.size() < 64) {
      const float a = random.uniform(1.0f, 2.0f), b = tie / a;
      if (reference::product(a, b) != tie) continue;
      inexact += double{a} * double{b} != double{tie};
      gradient.push_back(a);
      scale.push_back(b);
    }
    CHECK(inexact > 32);
    check_gradient({64, 1, DataType::kFloat32, DataType::kInt8, out_type,
                    reference::encode(DataType::kFloat32, gradient), std::vector<uint8_t>(64, 1),
                    scale, 1.0f});
  }
}

TEST(WeightGradient, AcceptsArraysAlignedToTheirElementOnly) {
  for (Placement placement : kPlacements) {
    for (const auto& [rows, columns] :
         std::vector<std::pair<int64_t, int64_t>>{{3, 5}, {1, 64}, {5, 72}}) {
      for (DataType gradient_type : kFloatTypes) {
        for (DataType weight_type : kValueTypes) {
          for (DataType out_type : kFloatTypes) {
            GradientCall call =
                random_gradient(rows, columns, gradient_type, weight_type, out_type, true, 1.0f);
            call.placement = placement;
            check_gradient(call);
          }
        }
      }
    }
  }
}

TEST(WeightGradient, LargeWeightMatchesReference) {
  for (DataType weight_type : kValueTypes) {
    check_gradient(random_gradient(130, 1153, DataType::kFloat16, weight_type, DataType::kFloat32,
                                   true, 1.0f));
  }
}

TEST(WeightGradient, NoValuesWriteNothing) {
  for (const Queue& queue : queues()) {
    for (const auto& [rows, columns] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 5}, {5, 0}, {0, 0}}) {
      const Buffer a(queue, 64, 4), out(queue, 64, 4);
      weight_gradient(rows, columns, a.data(), DataType::kFloat32, a.data(), DataType::kFloat32,
                      a.as<float>(), 1.0f, out.data(), DataType::kFloat16, queue);
      weight_gradient(rows, columns, nullptr, DataType::kFloat16, nullptr, DataType::kInt8, nullptr,
                      1.0f, nullptr, DataType::kFloat32, queue);
      a.check_untouched("inputs");
      out.check_untouched("out");
    }
  }
}

TEST(GradientErrors, CudaQueueIsNotSupportedByACpuBuild) {
  if (*cuda_architectures() != '\0') throw Skip{"built with CUDA"};
  const Queue cuda = Queue::cuda(nullptr, 0);
  const Buffer a(Queue::cpu(), 4096, 16), b(Queue::cpu(), 4096, 16);
  constexpr DataType kType = DataType::kFloat32;
  const ImageShape image{1, 3, 2, 2};
  CHECK_ERROR(sign_values(image, a.data(), 1, b.data(), kType, Layout::kNCHW, cuda),
              Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(mask_values(image, a.data(), 1, b.data(), kType, Layout::kNCHW, cuda),
              Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(scaled_signs(2, 4, a.data(), kType, nullptr, b.data(), kType, cuda),
              Status::kNotSupported, "queue", "CUDA");
  CHECK_ERROR(
      weight_gradient(2, 4, a.data(), kType, a.data(), kType, nullptr, 1.0f, b.data(), kType, cuda),
      Status::kNotSupported, "queue", "CUDA");
  b.check_untouched("output");
}

TEST(GradientErrors, BadImageSizesAreRejected) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    const auto check = [&](const ImageShape& shape, int64_t pixel_bytes,
                           const std::vector<std::string>& words) {
      for (ImageFunction function : {sign_values, mask_values}) {
        for (Layout layout : kLayouts) {
          check_error(
              __FILE__, __LINE__, function == sign_values ? "sign_values" : "mask_values",
              [&] {
                function(shape, a.data(), pixel_bytes, b.data(), DataType::kFloat16, layout, queue);
              },
              kInvalid, words);
        }
      }
    };
    for (int64_t value : {int64_t{-1}, -kTwo31, kLowest}) {
      check({value, 3, 2, 2}, 1, {"batch", text(value)});
      check({1, value, 2, 2}, 1, {"channels", text(value)});
      check({1, 3, value, 2}, 1, {"height", text(value)});
      check({1, 3, 2, value}, 1, {"width", text(value)});
    }
    for (int64_t value : {kTwo31, kTwo62, kHighest}) {
      check({1, value, 2, 2}, value / 8 + 1, {text(value)});
      check({1, 3, value, 2}, 1, {text(value)});
      check({1, 3, 2, value}, 1, {text(value)});
    }
    check({kTwo62, 3, 2, 2}, 1, {text(kTwo62)});
    check({kHighest, 3, 2, 2}, 1, {text(kHighest)});
    check({kTwo31, kTwo31 - 1, kTwo31 - 1, 2}, kTwo31 / 8, {text(kTwo31), text(kTwo31 - 1)});
    b.check_untouched("x");
  }
}

TEST(GradientErrors, BadPixelBytesAreRejected) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    for (ImageFunction function : {sign_values, mask_values}) {
      for (Layout layout : kLayouts) {
        const auto call = [&](int64_t channels, int64_t pixel_bytes) {
          function({1, channels, 2, 2}, a.data(), pixel_bytes, b.data(), DataType::kFloat32, layout,
                   queue);
        };
        for (int64_t channels : {1, 8, 9, 16, 33, 128, 130}) {
          for (int64_t value : {needed_bytes(channels) - 1, int64_t{0}, int64_t{-1}, kLowest}) {
            CHECK_ERROR(call(channels, value), kInvalid, "pixel_bytes", text(value));
          }
        }
        // The array of bits is too large.
        for (int64_t value : {kTwo62, kHighest}) {
          CHECK_ERROR(call(3, value), kInvalid, text(value));
        }
      }
    }
    b.check_untouched("x");
  }
}

TEST(GradientErrors, BadPointersOfImagesAreRejected) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    for (ImageFunction function : {sign_values, mask_values}) {
      const auto call = [&](const void* bits, void* x, DataType type) {
        function({1, 3, 2, 2}, bits, 1, x, type, Layout::kNCHW, queue);
      };
      CHECK_ERROR(call(nullptr, b.data(), DataType::kFloat32), kInvalid, "bits", "null");
      CHECK_ERROR(call(a.data(), nullptr, DataType::kFloat32), kInvalid, "x", "null");
      for (int offset : {1, 2, 3}) {
        CHECK_ERROR(call(a.data(), beyond(b.data(), offset), DataType::kFloat32), kInvalid, "x",
                    "multiple of 4");
      }
      for (DataType type : {DataType::kFloat16, DataType::kBFloat16}) {
        CHECK_ERROR(call(a.data(), beyond(b.data(), 1), type), kInvalid, "x", "multiple of 2");
      }
    }
    b.check_untouched("x");
  }
}

TEST(GradientErrors, WrongTypesAndLayoutsOfImagesAreRejected) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    for (ImageFunction function : {sign_values, mask_values}) {
      const auto call = [&](DataType type, Layout layout) {
        function({1, 3, 2, 2}, a.data(), 1, b.data(), type, layout, queue);
      };
      for (DataType type : kNoFloatTypes) {
        CHECK_ERROR(call(type, Layout::kNHWC), kInvalid, "type", reference::type_name(type),
                    "bfloat16");
      }
      CHECK_ERROR(call(static_cast<DataType>(99), Layout::kNHWC), kInvalid, "type", "unknown");
      CHECK_ERROR(call(DataType::kFloat32, static_cast<Layout>(7)), kInvalid, "layout", "7");
    }
    b.check_untouched("x");
  }
}

TEST(GradientErrors, ScaledSignsRejectsBadArguments) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    const auto call = [&](int64_t rows, int64_t columns, const void* weight, DataType weight_type,
                          const void* scale, void* out, DataType out_type) {
      scaled_signs(rows, columns, weight, weight_type, static_cast<const float*>(scale), out,
                   out_type, queue);
    };
    const auto size = [&](int64_t rows, int64_t columns, DataType type = DataType::kFloat32) {
      call(rows, columns, a.data(), DataType::kInt8, a.data(), b.data(), type);
    };
    for (int64_t value : {int64_t{-1}, kLowest}) {
      CHECK_ERROR(size(value, 4), kInvalid, "rows", text(value));
      CHECK_ERROR(size(4, value), kInvalid, "columns", text(value));
    }
    CHECK_ERROR(size(kTwo62, 4), kInvalid, text(kTwo62), "64 bits");
    CHECK_ERROR(size(3, kHighest), kInvalid, text(kHighest), "64 bits");
    CHECK_ERROR(size(kTwo31, kTwo31), kInvalid, text(kTwo31));
    // The weight has fewer than 2^63 bytes, but the result does not.
    CHECK_ERROR(size(kTwo62, 1, DataType::kFloat16), kInvalid, text(kTwo62));

    constexpr DataType kType = DataType::kFloat32;
    const auto pointers = [&](const void* weight, const void* scale, void* out,
                              DataType type = DataType::kFloat32) {
      call(2, 4, weight, type, scale, out, type);
    };
    CHECK_ERROR(pointers(nullptr, a.data(), b.data()), kInvalid, "weight", "null");
    CHECK_ERROR(pointers(a.data(), a.data(), nullptr), kInvalid, "out", "null");
    for (int offset : {1, 2}) {
      CHECK_ERROR(pointers(beyond(a.data(), offset), a.data(), b.data()), kInvalid, "weight",
                  "multiple of 4");
      CHECK_ERROR(pointers(a.data(), beyond(a.data(), offset), b.data()), kInvalid, "scale",
                  "multiple of 4");
      CHECK_ERROR(pointers(a.data(), a.data(), beyond(b.data(), offset)), kInvalid, "out",
                  "multiple of 4");
    }
    for (DataType type : {DataType::kFloat16, DataType::kBFloat16}) {
      CHECK_ERROR(pointers(beyond(a.data(), 1), a.data(), b.data(), type), kInvalid, "weight",
                  "multiple of 2");
      CHECK_ERROR(pointers(a.data(), a.data(), beyond(b.data(), 1), type), kInvalid, "out",
                  "multiple of 2");
    }

    const auto types = [&](DataType weight_type, DataType out_type) {
      call(2, 4, a.data(), weight_type, a.data(), b.data(), out_type);
    };
    for (DataType type : {DataType::kInt32, DataType::kBits}) {
      CHECK_ERROR(types(type, kType), kInvalid, "weight_type", reference::type_name(type),
                  "bfloat16");
    }
    for (DataType type : kNoFloatTypes) {
      CHECK_ERROR(types(kType, type), kInvalid, "out_type", reference::type_name(type), "bfloat16");
    }
    b.check_untouched("out");
  }
}

TEST(GradientErrors, WeightGradientRejectsBadSizesAndPointers) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    const auto size = [&](int64_t rows, int64_t columns, DataType type = DataType::kFloat32) {
      weight_gradient(rows, columns, a.data(), type, a.data(), DataType::kInt8, a.as<float>(), 1.0f,
                      b.data(), type, queue);
    };
    for (int64_t value : {int64_t{-1}, kLowest}) {
      CHECK_ERROR(size(value, 4), kInvalid, "rows", text(value));
      CHECK_ERROR(size(4, value), kInvalid, "columns", text(value));
    }
    CHECK_ERROR(size(kTwo62, 4), kInvalid, text(kTwo62), "64 bits");
    CHECK_ERROR(size(3, kHighest), kInvalid, text(kHighest), "64 bits");
    CHECK_ERROR(size(kTwo31, kTwo31), kInvalid, text(kTwo31));
    // The weight has fewer than 2^63 bytes, but the gradient does not.
    CHECK_ERROR(size(kTwo62, 1, DataType::kFloat16), kInvalid, text(kTwo62));

    const auto call = [&](const void* gradient, const void* weight, const void* scale, void* out,
                          DataType type = DataType::kFloat32) {
      weight_gradient(2, 4, gradient, type, weight, type, static_cast<const float*>(scale), 1.0f,
                      out, type, queue);
    };
    CHECK_ERROR(call(nullptr, a.data(), a.data(), b.data()), kInvalid, "gradient", "null");
    CHECK_ERROR(call(a.data(), nullptr, a.data(), b.data()), kInvalid, "weight", "null");
    CHECK_ERROR(call(a.data(), a.data(), a.data(), nullptr), kInvalid, "out", "null");
    for (int offset : {1, 2}) {
      CHECK_ERROR(call(beyond(a.data(), offset), a.data(), a.data(), b.data()), kInvalid,
                  "gradient", "multiple of 4");
      CHECK_ERROR(call(a.data(), beyond(a.data(), offset), a.data(), b.data()), kInvalid, "weight",
                  "multiple of 4");
      CHECK_ERROR(call(a.data(), a.data(), beyond(a.data(), offset), b.data()), kInvalid, "scale",
                  "multiple of 4");
      CHECK_ERROR(call(a.data(), a.data(), a.data(), beyond(b.data(), offset)), kInvalid, "out",
                  "multiple of 4");
    }
    for (DataType type : {DataType::kFloat16, DataType::kBFloat16}) {
      CHECK_ERROR(call(beyond(a.data(), 1), a.data(), a.data(), b.data(), type), kInvalid,
                  "gradient", "multiple of 2");
      CHECK_ERROR(call(a.data(), beyond(a.data(), 1), a.data(), b.data(), type), kInvalid, "weight",
                  "multiple of 2");
      CHECK_ERROR(call(a.data(), a.data(), a.data(), beyond(b.data(), 1), type), kInvalid, "out",
                  "multiple of 2");
    }
    b.check_untouched("out");
  }
}

TEST(GradientErrors, WeightGradientRejectsWrongTypesAndLimits) {
  for (const Queue& queue : queues()) {
    const Buffer a(queue, 4096, 16), b(queue, 4096, 16);
    const auto call = [&](DataType gradient_type, DataType weight_type, DataType out_type,
                          float limit = 1.0f) {
      weight_gradient(2, 4, a.data(), gradient_type, a.data(), weight_type, nullptr, limit,
                      b.data(), out_type, queue);
    };
    constexpr DataType kType = DataType::kFloat32;
    for (DataType type : kNoFloatTypes) {
      CHECK_ERROR(call(type, kType, kType), kInvalid, "gradient_type", reference::type_name(type),
                  "bfloat16");
      CHECK_ERROR(call(kType, kType, type), kInvalid, "out_type", reference::type_name(type),
                  "bfloat16");
    }
    for (DataType type : {DataType::kInt32, DataType::kBits}) {
      CHECK_ERROR(call(kType, type, kType), kInvalid, "weight_type", reference::type_name(type),
                  "bfloat16");
    }
    CHECK_ERROR(call(kType, kType, kType, -1.5f), kInvalid, "limit", "-1.5", "at least 0");
    CHECK_ERROR(call(kType, kType, kType, -kSmallest), kInvalid, "limit", "at least 0");
    CHECK_ERROR(call(kType, kType, kType, -kInfinity), kInvalid, "limit", "-inf", "at least 0");
    CHECK_ERROR(call(kType, kType, kType, kNaN), kInvalid, "limit", "nan", "at least 0");
    b.check_untouched("out");
  }
}

}  // namespace binconv::test
