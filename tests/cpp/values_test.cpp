#include <vector>

#include "conv2d_check.h"
#include "test.h"

namespace binconv::test {
namespace {

std::vector<EpilogueCase> every_kind_of_epilogue() {
  constexpr EpilogueCase::Activation kActivation = {
      .in_shift = true, .slope = true, .out_shift = true};
  constexpr auto kPerChannel = EpilogueCase::Thresholds::kPerChannel;
  std::vector<EpilogueCase> cases = {
      {},
      {.out_layout = Layout::kNCHW, .clamp = true},
      {.out_type = DataType::kBits},
      {.out_type = DataType::kBits, .clamp = true, .bias = true, .below = true},
      {.out_type = DataType::kBits,
       .scale = true,
       .residual = DataType::kFloat16,
       .activation = kActivation,
       .thresholds = kPerChannel,
       .below = true}};
  for (DataType type : kFloatTypes) {
    for (Layout layout : kLayouts) {
      cases.push_back({.out_type = type, .out_layout = layout, .scale = true, .bias = true});
      cases.push_back({.out_type = type, .out_layout = layout, .residual = type});
      cases.push_back({.out_type = type,
                       .out_layout = layout,
                       .clamp = true,
                       .bias = true,
                       .activation = kActivation});
      cases.push_back({.out_type = type,
                       .out_layout = layout,
                       .scale = true,
                       .thresholds = kPerChannel,
                       .bits_beside = true});
    }
  }
  return cases;
}

void check_every_type_and_layout(const Problem& problem) {
  run_on_every_kernel(problem, [](const Run& run) {
    for (DataType type : kValueTypes) {
      for (Layout layout : kLayouts) {
        for (bool per_channel : {false, true}) run.check_values({}, type, layout, per_channel);
      }
    }
  });
}

}  // namespace

TEST(Conv2dValues, EveryTypeAndLayoutMatchesReference) {
  for (int64_t in_channels : {13, 40, 136}) {
    check_every_type_and_layout(Problem(shape_1x1(2, in_channels, 5, 7, 21), in_channels));
    Conv2dShape shape = shape_3x3(2, in_channels, 5, 6, 21);
    shape.pad_value = -1;
    check_every_type_and_layout(Problem(shape, in_channels));
    shape.pad_value = 0;
    shape.dilation_height = 2;
    check_every_type_and_layout(Problem(shape, in_channels));
  }
  for (int64_t kernel : {1, 3}) {
    Conv2dShape shape = shape_3x3(2, 48, 4, 6, 18);
    shape.weight.kernel_height = shape.weight.kernel_width = kernel;
    shape.weight.groups = 2;
    check_every_type_and_layout(Problem(shape, kernel));
  }
}

TEST(Conv2dValues, EveryChannelCountMatchesReference) {
  constexpr int64_t kWork = 1'000'000;
  const std::vector<EpilogueCase> epilogues = every_kind_of_epilogue();
  uint64_t seed = 0;
  for (int64_t in_channels : {1, 8, 13, 24, 64, 120, 128, 136, 256, 1000, 2048}) {
    for (int64_t out_channels : {1, 7, 32, 33, 40, 64, 96, 128, 129, 200, 300}) {
      Random random(++seed);
      const auto [height, width] =
          random.pick<std::pair<int64_t, int64_t>>({{1, 1}, {7, 7}, {5, 9}});
      Conv2dShape shape = shape_1x1(random.pick({1, 3}), in_channels, height, width, out_channels);
      shape.stride_height = random.pick({1, 2});
      shape.stride_width = shape.stride_height == 1 ? 1 : random.pick({2, 3});
      const DataType type =
          random.pick({DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16});
      const EpilogueCase& epilogue = epilogues[seed % epilogues.size()];
      run_on_every_kernel(Problem(shape, seed, kWork), [&](const Run& run) {
        run.check_values(epilogue, type, Layout::kNHWC, seed % 2 == 0);
      });
    }
  }
}

TEST(Conv2dValues, EveryStrideMatchesReference) {
  uint64_t seed = 0;
  for (const auto& [stride_height, stride_width] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {2, 2}, {2, 3}, {9, 1}}) {
    for (const auto& [height, width] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {7, 7}, {5, 9}, {12, 17}}) {
      for (int64_t batch : {1, 3}) {
        Conv2dShape shape = shape_1x1(batch, 72, height, width, 40);
        shape.stride_height = stride_height;
        shape.stride_width = stride_width;
        const DataType type = kFloatTypes[++seed % 3];
        run_on_every_kernel(Problem(shape, seed), [&](const Run& run) {
          run.check_values({}, type, Layout::kNHWC, false);
        });
      }
    }
  }
}

TEST(Conv2dValues, EveryEpilogueMatchesReference) {
  Conv2dShape strided = shape_1x1(3, 24, 5, 9, 40);
  strided.stride_height = 2;
  strided.stride_width = 3;
  for (const Conv2dShape& shape :
       {shape_1x1(1, 64, 7, 7, 64), strided, shape_1x1(1, 136, 3, 5, 200)}) {
    run_on_every_kernel(Problem(shape), [](const Run& run) {
      size_t i = 0;
      for (const EpilogueCase& epilogue : every_kind_of_epilogue()) {
        ++i;
        run.check_values(epilogue, kFloatTypes[i % 3], Layout::kNHWC, i % 2 == 0);
      }
    });
  }
}

TEST(Conv2dValues, LargestChannelCountsMatchReference) {
  constexpr int64_t kWork = 1'000'000;
  for (const Conv2dShape& shape :
       {shape_1x1(1, 4096, 3, 7, 8), shape_1x1(1, 4104, 3, 7, 8), shape_1x1(1, 24, 3, 7, 512),
        shape_1x1(1, 24, 3, 7, 513), shape_1x1(1, 20000, 2, 1, 3)}) {
    run_on_every_kernel(Problem(shape, 1, kWork), [](const Run& run) {
      run.check_values({}, DataType::kFloat16, Layout::kNHWC, false);
      run.check_values({.out_type = DataType::kBits}, DataType::kFloat32, Layout::kNHWC, true);
    });
  }
}

TEST(Conv2dValues, LargeImageMatchesReference) {
  constexpr int64_t kWork = 4'000'000;
  run_on_every_kernel(Problem(shape_1x1(1, 16, 230, 231, 40), 1, kWork), [](const Run& run) {
    run.check_values({.out_type = DataType::kBFloat16}, DataType::kBFloat16, Layout::kNHWC, false);
  });
}

TEST(Conv2dValues, MemoryAlignedToNoMoreThanItMustBeSuffices) {
  for (Placement placement : {Placement::kStart, Placement::kOffEnd}) {
    for (const Conv2dShape& shape : {shape_1x1(1, 64, 5, 7, 40), shape_3x3(1, 64, 5, 7, 40)}) {
      for (uint64_t seed = 1; seed <= 4; ++seed) {
        const auto check = [](const Run& run) {
          for (DataType type : kValueTypes) {
            run.check_values({.out_type = DataType::kFloat16, .residual = DataType::kFloat16}, type,
                             Layout::kNHWC, true);
          }
        };
        run_on_every_kernel(Problem(shape, seed), check, placement);
      }
    }
  }
}

TEST(Conv2dValues, EmptyBatchNeedsNoMemory) {
  for (const Conv2dShape& shape : {shape_1x1(0, 64, 4, 5, 12), shape_3x3(0, 64, 4, 5, 12)}) {
    for (const Queue& queue : kernel_queues()) {
      for (DataType type : kValueTypes) {
        for (Layout layout : kLayouts) {
          binary_conv2d(shape, Values{.type = type, .layout = layout}, nullptr, {}, nullptr,
                        nullptr, queue);
        }
      }
    }
  }
}

}  // namespace binconv::test
