#include "random.h"
#include "test.h"
#include "weight_check.h"

namespace binconv::test {

TEST(WeightOfValues, IsThatOfItsBits) {
  const std::vector<WeightShape> shapes = {
      {1, 1, 1, 1},   {3, 5, 3, 3},     {130, 33, 3, 3},  {64, 64, 3, 3},
      {7, 128, 1, 1}, {200, 300, 1, 1}, {8, 32, 5, 2, 2}, {9, 48, 2, 7, 3},
      {2, 3, 40, 1},  {2, 130, 1, 35},  {4, 8, 12, 34},   {5, 1100, 3, 3},
  };
  uint64_t seed = 0;
  for (const WeightShape& shape : shapes) {
    for (DataType type : kValueTypes) {
      for (Layout layout : kLayouts) {
        const auto placement = layout == Layout::kNCHW ? Placement::kOffEnd : Placement::kEnd;
        ++seed;
        for (const Queue& queue : kernel_queues()) {
          const Context context("seed " + std::to_string(seed) + " on " + describe(queue));
          run_guarded([&] {
            check_weight_of_values(shape, queue, type, layout, false, placement, seed);
            if (type == DataType::kInt8) return;
            check_weight_of_values(shape, queue, type, layout, true, placement, seed);
          });
        }
      }
    }
  }
}

TEST(WeightOfValues, ConvolvesAsItsBitsDo) {
  for (int64_t in_channels : {13, 64, 200}) {
    const Conv2dShape shape = shape_3x3(2, in_channels, 5, 6, 21);
    const Problem problem(shape, static_cast<uint64_t>(in_channels));
    Random random(static_cast<uint64_t>(in_channels));
    const std::vector<uint8_t> elements =
        draw_values_of(problem.packed_weight(), {21, in_channels, 3, 3}, DataType::kBFloat16,
                       Layout::kNHWC, random);
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
