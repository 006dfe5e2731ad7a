#include <cmath>

#include "conv2d_check.h"
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

// In the order of an image of kNCHW.
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

void check_on(const Queue& queue, const WeightShape& shape, const std::vector<uint8_t>& elements,
              DataType type, Layout layout, bool has_means, Placement placement) {
  const ImageShape filters = filters_of(shape);
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

void check(const WeightShape& shape, DataType type, Layout layout, Placement placement) {
  Random random(static_cast<uint64_t>(shape.in_channels * 31 + shape.kernel_width));
  const int64_t count = reference::element_count(filters_of(shape));
  const std::vector<uint8_t> elements =
      reference::encode(type, values_with_special_ones(count, random));
  for (const Queue& queue : kernel_queues()) {
    for (bool has_means : {false, true}) {
      if (has_means && type == DataType::kInt8) continue;
      const Context context(describe(queue) + ", type " + reference::type_name(type));
      run_guarded([&] { check_on(queue, shape, elements, type, layout, has_means, placement); });
    }
  }
}

}  // namespace

TEST(WeightOfValues, IsThatOfItsBits) {
  const std::vector<WeightShape> shapes = {
      {1, 1, 1, 1},   {3, 5, 3, 3},     {130, 33, 3, 3},  {64, 64, 3, 3},
      {7, 128, 1, 1}, {200, 300, 1, 1}, {8, 32, 5, 2, 2}, {9, 48, 2, 7, 3},
      {2, 3, 40, 1},  {2, 130, 1, 35},  {4, 8, 12, 34},   {5, 1100, 3, 3},
  };
  for (const WeightShape& shape : shapes) {
    const Context context(
        std::to_string(shape.out_channels) + " x " + std::to_string(shape.in_channels) + " x " +
        std::to_string(shape.kernel_height) + " x " + std::to_string(shape.kernel_width));
    for (DataType type : kValueTypes) {
      for (Layout layout : kLayouts) {
        check(shape, type, layout, layout == Layout::kNCHW ? Placement::kOffEnd : Placement::kEnd);
      }
    }
  }
}

TEST(WeightOfValues, ConvolvesAsItsBitsDo) {
  for (int64_t in_channels : {13, 64, 200}) {
    const Conv2dShape shape = shape_3x3(2, in_channels, 5, 6, 21);
    const Problem problem(shape, static_cast<uint64_t>(in_channels));
    const ImageShape filters = filters_of(shape.weight);
    std::vector<float> values(reference::element_count(filters));
    // The signs of the problem's weight, from its bits.
    const std::vector<uint8_t>& packed = problem.packed_weight();
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
      const int64_t pixel = i / filters.channels, channel = i % filters.channels;
      const uint8_t byte = packed[pixel * reference::pixel_bytes(filters.channels) + channel / 8];
      values[i] = byte >> channel % 8 & 1 ? 0.5f : -0.25f;  // OHWI
    }
    const auto elements = reference::encode(DataType::kBFloat16, values);
    for (const Queue& queue : kernel_queues(shape)) {
      const Context context(describe(queue));
      run_guarded([&] {
        const Buffer weight(queue, elements, 2);
        const auto prepared = std::make_shared<Buffer>(
            queue, prepared_weight_bytes(shape.weight, queue), 16, Placement::kEnd);
        const Buffer workspace(queue, weight_workspace_bytes(shape.weight, queue), 16);
        prepare_weight(shape.weight, weight.data(), DataType::kBFloat16, Layout::kNHWC,
                       prepared->data(), nullptr, workspace.data(), queue);
        prepared->remember();
        Run(problem, queue, prepared).check({});
      });
    }
  }
}

}  // namespace binconv::test
