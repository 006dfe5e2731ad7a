#include "weight_check.h"

#include <cmath>
#include <limits>

#include "random.h"
#include "test.h"

namespace binconv::test {
namespace {

ImageShape filters_of(const WeightShape& shape) {
  return {shape.out_channels, shape.in_channels / shape.groups, shape.kernel_height,
          shape.kernel_width};
}

std::vector<float> values_with_special_ones(int64_t count, Random& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<float> values(count);
  for (float& value : values) {
    value = random.uniform(-2.0f, 2.0f);
    if (random.one_in(8)) {
      value = random.pick({0.0f, -0.0f, NAN, kInfinity, -kInfinity, 1e-45f, -1e-45f, -1.0f});
    }
  }
  return values;
}

std::vector<uint8_t> packed_signs(const ImageShape& shape, const std::vector<uint8_t>& elements,
                                  DataType type, Layout layout) {
  reference::Image signs(shape);
  for (int64_t n = 0; n < shape.batch; ++n) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t h = 0; h < shape.height; ++h) {
        for (int64_t w = 0; w < shape.width; ++w) {
          const int64_t i = reference::offset(shape, layout, n, c, h, w);
          const float value = reference::load(type, elements.data(), i);
          signs.at(n, c, h, w) = value >= 0.0f ? 1 : -1;
        }
      }
    }
  }
  return reference::pack(signs);
}

}  // namespace

void check_weight_of_values(const WeightShape& shape, const Queue& queue, DataType type,
                            Layout layout, bool has_means, Placement placement, uint64_t seed) {
  Random random(seed);
  const ImageShape filters = filters_of(shape);
  const std::vector<uint8_t> elements =
      reference::encode(type, values_with_special_ones(reference::element_count(filters), random));
  const int64_t columns = filters.channels * filters.height * filters.width;
  const Buffer weight(queue, elements, reference::element_bytes(type), placement);
  const Buffer prepared(queue, prepared_weight_bytes(shape, queue), 16, placement);
  const Buffer means(queue, has_means ? shape.out_channels * 4 : 0, 4, placement);
  const int64_t bytes = weight_workspace_bytes(shape, queue);
  const Buffer workspace(queue, bytes, 16, placement);
  prepare_weight(shape, weight.data(), type, layout, prepared.data(),
                 has_means ? means.as<float>() : nullptr, bytes ? workspace.data() : nullptr,
                 queue);
  prepared.check_guards("prepared");
  means.check_guards("means");
  workspace.check_guards("workspace");
  weight.check_unchanged("weight");
  const auto expected = prepare(shape, packed_signs(filters, elements, type, layout), queue);
  CHECK_EQ(prepared.read(), expected->read());
  if (!has_means) return;
  const Buffer of_rows(queue, shape.out_channels * 4, 4);
  abs_mean(shape.out_channels, columns, weight.data(), type, of_rows.as<float>(), queue);
  CHECK_EQ(means.read(), of_rows.read());
}

void check_random_weight(const WeightShape& shape, const Queue& queue, uint64_t seed) {
  Random random(seed + 43);
  const DataType type =
      random.pick({DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16, DataType::kInt8});
  const Layout layout = random.pick({Layout::kNHWC, Layout::kNCHW});
  const bool has_means = type != DataType::kInt8 && random.one_in(2);
  const auto placement = random.pick({Placement::kStart, Placement::kEnd, Placement::kOffEnd});
  check_weight_of_values(shape, queue, type, layout, has_means, placement, seed);
}

}  // namespace binconv::test
