#include <cmath>
#include <limits>

#include "device.h"
#include "random.h"
#include "reference.h"
#include "test.h"

namespace binconv::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargest = std::numeric_limits<float>::max();

std::vector<float> run_abs_mean(int64_t rows, int64_t columns, const std::vector<uint8_t>& elements,
                                DataType type, const Queue& queue) {
  const Buffer x(queue, elements, reference::element_bytes(type));
  const Buffer out(queue, rows * 4, 4);
  abs_mean(rows, columns, x.data(), type, out.as<float>(), queue);
  out.check_guards("out");
  x.check_unchanged("x");
  return out.read_as<float>();
}

// The sum in double is off by less than columns * 2^-52 of itself, so what is rounded to float is
// the exact mean to that precision.
void check_mean(float got, long double mean, int64_t columns) {
  const float nearest = static_cast<float>(mean);
  const long double ulp = std::nextafter(nearest, kInfinity) - nearest;
  const long double tolerance = ulp / 2 + mean * static_cast<long double>(columns + 2) * 0x1p-52L;
  if (std::fabs(got - mean) <= tolerance) return;
  std::ostringstream message;
  message.precision(12);
  message << "got " << got << ", expected " << mean;
  report_failure(__FILE__, __LINE__, message.str());
}

void check_abs_mean(int64_t rows, int64_t columns, const std::vector<float>& values,
                    DataType type) {
  const std::vector<uint8_t> elements = reference::encode(type, values);
  std::vector<std::vector<float>> results;
  for (const Queue& queue : queues()) {
    const Context context("rows " + std::to_string(rows) + ", columns " + std::to_string(columns) +
                          ", type " + std::to_string(static_cast<int>(type)) + " on " +
                          describe(queue));
    run_guarded([&] {
      const std::vector<float> got = run_abs_mean(rows, columns, elements, type, queue);
      for (int64_t r = 0; r < rows; ++r) {
        long double sum = 0;
        for (int64_t i = 0; i < columns; ++i) {
          sum += std::fabs(reference::load(type, elements.data(), r * columns + i));
        }
        check_mean(got[r], sum / columns, columns);
      }
      results.push_back(got);
      results.push_back(run_abs_mean(rows, columns, elements, type, queue));
    });
  }
  for (const std::vector<float>& result : results) CHECK_EQ(result, results[0]);
}

std::vector<float> uniform_values(int64_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = random.uniform(-2.0f, 2.0f);
  return values;
}

void check_scale_channels(const ImageShape& shape, const std::vector<float>& values,
                          const std::vector<float>& scale, DataType type, Layout layout,
                          Placement placement, bool in_place) {
  const std::vector<uint8_t> elements = reference::encode(type, values);
  std::vector<uint8_t> expected(elements.size());
  for (int64_t n = 0; n < shape.batch; ++n) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t h = 0; h < shape.height; ++h) {
        for (int64_t w = 0; w < shape.width; ++w) {
          const int64_t i = reference::offset(shape, layout, n, c, h, w);
          reference::store(type, expected.data(), i,
                           reference::load(type, elements.data(), i) * scale[c]);
        }
      }
    }
  }
  const int64_t bytes = reference::element_bytes(type);
  for (const Queue& queue : queues()) {
    const Buffer x(queue, elements, bytes, placement);
    const Buffer separate(queue, static_cast<int64_t>(elements.size()), bytes, placement);
    const Buffer scales(queue, scale, 4, placement);
    const Buffer& out = in_place ? x : separate;
    scale_channels(shape, x.data(), type, layout, scales.as<float>(), out.data(), queue);
    out.check_guards("out");
    scales.check_unchanged("scale");
    if (!in_place) x.check_unchanged("x");
    const std::vector<uint8_t> got = out.read();
    for (int64_t i = 0; i < reference::element_count(shape); ++i) {
      if (reference::same_element(type, got.data(), expected.data(), i)) continue;
      std::ostringstream message;
      message << "batch " << shape.batch << ", channels " << shape.channels << ", " << shape.height
              << "x" << shape.width << (layout == Layout::kNCHW ? ", NCHW" : ", NHWC") << ", type "
              << static_cast<int>(type) << (in_place ? ", in place" : "") << " on "
              << describe(queue) << ": got " << reference::load(type, got.data(), i)
              << ", expected " << reference::load(type, expected.data(), i) << " at element " << i;
      report_failure(__FILE__, __LINE__, message.str());
      break;
    }
  }
}

}  // namespace

TEST(AbsMean, MatchesDoubleReference) {
  for (DataType type : kFloatTypes) {
    for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{{1, 1},
                                                                                {1, 2},
                                                                                {5, 3},
                                                                                {7, 31},
                                                                                {3, 64},
                                                                                {64, 576},
                                                                                {130, 1153},
                                                                                {1, 36864},
                                                                                {1000, 7},
                                                                                {2, 100003}}) {
      check_abs_mean(rows, columns, uniform_values(rows * columns, columns), type);
    }
  }
}

TEST(AbsMean, SumsInDouble) {
  // In float32 the ones would vanish beside 2^25.
  std::vector<float> values(1 << 20, 1.0f);
  values[0] = 0x1p25f;
  check_abs_mean(1, static_cast<int64_t>(values.size()), values, DataType::kFloat32);
  check_abs_mean(2, 3, {kLargest, -kLargest, kLargest, 1e-42f, -1e-42f, 0.0f}, DataType::kFloat32);
}

TEST(AbsMean, LargeSumIsTheSameForEveryThreadCount) {
  check_abs_mean(1, 3'000'001, uniform_values(3'000'001, 3), DataType::kFloat32);
}

TEST(AbsMean, IgnoresSignsAndKeepsInfinityAndNaN) {
  for (const Queue& queue : queues()) {
    for (DataType type : kFloatTypes) {
      const std::vector<float> got = run_abs_mean(
          4, 3,
          reference::encode(type, {-0.0f, -0.0f, -0.0f, -1, 2, -3, 1, -kInfinity, 1, 1, kNaN, 1}),
          type, queue);
      CHECK_EQ(got[0], 0.0f);
      CHECK(!std::signbit(got[0]));
      CHECK_EQ(got[1], 2.0f);
      CHECK_EQ(got[2], kInfinity);
      CHECK(std::isnan(got[3]));
    }
  }
}

TEST(AbsMean, NoRowsWriteNothing) {
  for (const Queue& queue : queues()) {
    const Buffer out(queue, 16, 4);
    abs_mean(0, 5, out.data(), DataType::kFloat32, out.as<float>(), queue);
    abs_mean(0, 5, nullptr, DataType::kFloat32, nullptr, queue);
    out.check_untouched("out");
  }
}

TEST(ScaleChannels, MatchesReferenceInAndOutOfPlace) {
  for (DataType type : kFloatTypes) {
    for (const ImageShape& shape :
         {ImageShape{1, 1, 1, 1}, ImageShape{2, 7, 3, 5}, ImageShape{1, 8, 4, 4},
          ImageShape{3, 33, 1, 9}, ImageShape{1, 64, 7, 7}, ImageShape{2, 130, 5, 3},
          ImageShape{1, 96, 31, 65}}) {
      const std::vector<float> values = uniform_values(reference::element_count(shape), 11);
      const std::vector<float> scale = uniform_values(shape.channels, 12);
      for (Layout layout : {Layout::kNCHW, Layout::kNHWC}) {
        for (Placement placement : {Placement::kStart, Placement::kEnd, Placement::kOffEnd}) {
          for (bool in_place : {false, true}) {
            check_scale_channels(shape, values, scale, type, layout, placement, in_place);
          }
        }
      }
    }
  }
}

TEST(ScaleChannels, RoundsEverySpecialProductOnce) {
  const std::vector<float> specials = {
      0.0f,  -0.0f, kNaN,       kInfinity, -kInfinity, 1e-42f,   -1e-30f,  65504.0f, 1.0f / 3,
      1e38f, -1.0f, 1.0009766f, 6e-8f,     2049.0f,    -3.0e-8f, 65520.0f, 257.0f,   1e-45f};
  const int64_t count = static_cast<int64_t>(specials.size());
  std::vector<float> values;
  for (int64_t c = 0; c < count; ++c) values.insert(values.end(), specials.begin(), specials.end());
  for (DataType type : kFloatTypes) {
    check_scale_channels({1, count, 1, count}, values, specials, type, Layout::kNCHW,
                         Placement::kEnd, false);
    check_scale_channels({count, count, 1, 1}, values, specials, type, Layout::kNHWC,
                         Placement::kEnd, true);
  }
}

TEST(ScaleChannels, EmptyImageWritesNothing) {
  for (const Queue& queue : queues()) {
    for (const ImageShape& shape :
         {ImageShape{0, 3, 4, 4}, ImageShape{2, 3, 0, 4}, ImageShape{2, 3, 4, 0}}) {
      const Buffer out(queue, 64, 4);
      scale_channels(shape, nullptr, DataType::kFloat16, Layout::kNCHW, nullptr, out.data(), queue);
      out.check_untouched("out");
    }
  }
}

}  // namespace binconv::test
