#include "weight_check.h"

#include "random.h"
#include "test.h"

namespace binconv::test {

void check_weight_of_values(const WeightShape& shape, const Queue& queue, DataType type,
                            Layout layout, bool has_means, Placement placement, uint64_t seed) {
  Random random(seed);
  reference::Image signs({shape.out_channels, shape.in_channels / shape.groups, shape.kernel_height,
                          shape.kernel_width});
  random.fill_signs(signs.values);
  const ImageShape& filters = signs.shape;
  const std::vector<uint8_t> packed = reference::pack(signs);
  const std::vector<uint8_t> elements = draw_values_of(packed, filters, type, layout, random);
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
  const auto expected = prepare(shape, packed, queue);
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
