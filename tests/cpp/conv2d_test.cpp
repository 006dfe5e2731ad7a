#include <cmath>
#include <cstdio>
#include <limits>
#include <mutex>
#include <thread>

#include "conv2d_check.h"
#include "test.h"

namespace binconv::test {
namespace {

constexpr int kPadValues[] = {0, 1, -1};

Conv2dShape with_pads(Conv2dShape s, int64_t top, int64_t left, int64_t bottom, int64_t right) {
  s.pad_top = top;
  s.pad_left = left;
  s.pad_bottom = bottom;
  s.pad_right = right;
  return s;
}

// Sums and one kind of every output, for sweeps over shapes.
const std::vector<EpilogueCase> kSumsAndBits = {
    {},
    {.out_type = DataType::kBits,
     .scale = true,
     .bias = true,
     .thresholds = EpilogueCase::Thresholds::kPerChannel}};

}  // namespace

TEST(Conv2d, OnePixelByHand) {
  // Channels + - + against + + -: 1 - 1 - 1.
  Conv2dShape shape{
      .batch = 1,
      .in_height = 1,
      .in_width = 1,
      .weight = {.out_channels = 1, .in_channels = 3, .kernel_height = 1, .kernel_width = 1}};
  std::vector<uint8_t> x(16, 0), weight(16, 0);
  x[0] = 0b101;
  weight[0] = 0b011;
  for (const Queue& queue : kernel_queues()) {
    const std::shared_ptr<Buffer> prepared = prepare(shape.weight, weight, queue);
    const Buffer input(queue, x, 16), output(queue, 4, 4),
        workspace(queue, workspace_bytes(shape, queue), 16);
    binary_conv2d(shape, input.data(), prepared->data(), {.out_type = DataType::kInt32},
                  output.data(), workspace.data(), queue);
    CHECK_EQ(output.read_as<int>()[0], -1);
  }
}

TEST(Conv2d, EveryChannelCountMatchesReference) {
  uint64_t seed = 0;
  for (int64_t in_channels : {1, 7, 8, 31, 32, 33, 48, 64, 96, 127, 128, 130, 512}) {
    for (int64_t out_channels : {1, 7, 64, 130}) {
      Conv2dShape shape = shape_3x3(1, in_channels, 5, 6, out_channels);
      shape.pad_value = kPadValues[seed % 3];
      check_on_every_kernel(Problem(shape, ++seed), kSumsAndBits);
    }
  }
}

TEST(Conv2d, EveryOutputChannelCountMatchesReference) {
  for (int64_t out_channels = 1; out_channels <= 70; ++out_channels) {
    check_on_every_kernel(Problem(shape_3x3(1, 40, 3, 4, out_channels), out_channels),
                          kSumsAndBits);
  }
}

TEST(Conv2d, EveryInputChannelCountMatchesReference) {
  for (int64_t in_channels = 1; in_channels <= 140; ++in_channels) {
    check_on_every_kernel(Problem(shape_3x3(1, in_channels, 3, 3, 3), in_channels));
  }
}

TEST(Conv2d, EveryKernelExtentMatchesReference) {
  uint64_t seed = 0;
  for (const auto& [height, width] : std::vector<std::pair<int64_t, int64_t>>{{1, 1},
                                                                              {3, 3},
                                                                              {5, 5},
                                                                              {7, 7},
                                                                              {1, 7},
                                                                              {2, 3},
                                                                              {7, 1},
                                                                              {4, 4},
                                                                              {1, 16},
                                                                              {9, 2},
                                                                              {11, 11}}) {
    for (int64_t in_channels : {8, 33, 64, 130, 256}) {
      for (int64_t pad : {0, 1, 3}) {
        Conv2dShape shape = with_pads(shape_3x3(2, in_channels, 11, 17, 9), pad, pad, pad, pad);
        shape.weight.kernel_height = height;
        shape.weight.kernel_width = width;
        shape.pad_value = kPadValues[++seed % 3];
        check_on_every_kernel(Problem(shape, seed));
      }
    }
  }
}

TEST(Conv2d, EveryStrideMatchesReference) {
  for (int64_t height : {1, 2, 3, 4}) {
    for (int64_t width : {1, 2, 3, 7}) {
      for (int64_t kernel : {1, 3, 5}) {
        Conv2dShape shape = shape_3x3(2, 64, 13, 14, 17);
        shape.weight.kernel_height = shape.weight.kernel_width = kernel;
        shape.stride_height = height;
        shape.stride_width = width;
        check_on_every_kernel(Problem(shape, height * 10 + width));
      }
    }
  }
}

TEST(Conv2d, ZeroPaddingMatchesReference) {
  for (int64_t pad : {0, 1, 2, 3}) {
    check_on_every_kernel(Problem(with_pads(shape_3x3(2, 100, 6, 9, 20), pad, pad, pad, pad)),
                          kSumsAndBits);
  }
}

TEST(Conv2d, EveryPadValueMatchesReferenceOnEverySide) {
  for (int pad_value : kPadValues) {
    for (const auto& [top, left, bottom, right] :
         std::vector<std::array<int64_t, 4>>{{1, 0, 0, 0},
                                             {0, 1, 0, 0},
                                             {0, 0, 1, 0},
                                             {0, 0, 0, 1},
                                             {0, 1, 1, 2},
                                             {2, 0, 3, 1},
                                             {3, 2, 0, 0},
                                             {1, 4, 2, 3}}) {
      Conv2dShape shape = with_pads(shape_3x3(2, 72, 5, 7, 19), top, left, bottom, right);
      shape.pad_value = pad_value;
      check_on_every_kernel(Problem(shape, top + left), kSumsAndBits);
      shape.stride_height = 2;
      shape.stride_width = 3;
      check_on_every_kernel(Problem(shape, top + left));
    }
  }
}

TEST(Conv2d, PadsOfAtLeastTheKernelMatchReference) {
  for (int pad_value : kPadValues) {
    for (int64_t kernel : {1, 2, 3}) {
      for (int64_t pad : {kernel, kernel + 1, kernel + 5}) {
        Conv2dShape shape = with_pads(shape_3x3(1, 40, 3, 2, 10), pad, pad + 2, pad, pad);
        shape.weight.kernel_height = shape.weight.kernel_width = kernel;
        shape.pad_value = pad_value;
        check_on_every_kernel(Problem(shape, pad), kSumsAndBits);
        shape.stride_width = 4;
        shape.dilation_height = 2;
        check_on_every_kernel(Problem(shape, pad));
      }
    }
  }
}

TEST(Conv2d, KernelAsLargeAsThePaddedImageMatchesReference) {
  for (int pad_value : kPadValues) {
    Conv2dShape shape = with_pads(shape_3x3(2, 33, 4, 6, 5), 1, 2, 0, 1);
    shape.weight.kernel_height = 5;
    shape.weight.kernel_width = 9;
    shape.pad_value = pad_value;
    check_on_every_kernel(Problem(shape));
  }
}

TEST(Conv2d, EveryDilationMatchesReference) {
  for (int64_t height : {1, 2, 3}) {
    for (int64_t width : {1, 2, 3, 6}) {
      for (int pad_value : kPadValues) {
        Conv2dShape shape = with_pads(shape_3x3(1, 48, 11, 13, 18), height, width, height, width);
        shape.dilation_height = height;
        shape.dilation_width = width;
        shape.pad_value = pad_value;
        check_on_every_kernel(Problem(shape, height + width));
        shape.stride_height = shape.stride_width = 2;
        check_on_every_kernel(Problem(shape, height + width));
      }
    }
  }
}

TEST(Conv2d, GroupsMatchReference) {
  uint64_t seed = 0;
  for (int64_t group_channels : {8, 16, 24, 40, 64, 120, 128, 136, 264}) {
    for (int64_t groups : {2, 3, 5}) {
      for (int64_t group_outputs : {1, 4, 17}) {
        Conv2dShape shape = shape_3x3(2, group_channels * groups, 5, 4, group_outputs * groups);
        shape.weight.groups = groups;
        shape.pad_value = kPadValues[++seed % 3];
        check_on_every_kernel(Problem(shape, seed), kSumsAndBits);
      }
    }
  }
}

TEST(Conv2d, ManyGroupsMatchReference) {
  Conv2dShape shape = shape_3x3(1, 8 * 37, 6, 6, 37);
  shape.weight.groups = 37;
  check_on_every_kernel(Problem(shape), kSumsAndBits);
}

TEST(Conv2d, EveryImageExtentMatchesReference) {
  uint64_t seed = 0;
  for (int64_t height : {1, 2, 3, 7, 8, 9, 16, 31}) {
    for (int64_t width : {1, 2, 5, 8, 15, 16, 17, 33}) {
      Conv2dShape shape = shape_3x3(1, 32, height, width, 8);
      shape.pad_value = kPadValues[++seed % 3];
      check_on_every_kernel(Problem(shape, seed));
    }
  }
  for (int64_t width = 1; width <= 40; ++width) {
    check_on_every_kernel(Problem(shape_3x3(1, 16, 2, width, 5), width));
  }
}

TEST(Conv2d, EveryBatchMatchesReference) {
  for (int64_t batch : {0, 1, 2, 3, 17, 64}) {
    check_on_every_kernel(Problem(shape_3x3(batch, 64, 4, 5, 12)), kSumsAndBits);
  }
}

TEST(Conv2d, EmptyBatchNeedsNoMemory) {
  const Conv2dShape shape = shape_3x3(0, 64, 4, 5, 12);
  for (const Queue& queue : kernel_queues()) {
    const Buffer thresholds(queue, std::vector<float>(12, 0.0f), 4);
    binary_conv2d(shape, nullptr, nullptr, {}, nullptr, nullptr, queue);
    binary_conv2d(shape, nullptr, nullptr, {.threshold = {0.0f, thresholds.as<float>()}}, nullptr,
                  nullptr, queue);
  }
}

TEST(Conv2d, LargeImageMatchesReference) {
  check_on_every_kernel(Problem(shape_3x3(1, 64, 160, 227, 40), 3), kSumsAndBits);
}

TEST(Conv2d, MemoryAlignedToNoMoreThanItMustBeSuffices) {
  for (Placement placement : {Placement::kStart, Placement::kOffEnd}) {
    for (int64_t in_channels : {64, 256, 512}) {
      const Problem problem(shape_3x3(1, in_channels, 6, 8, 48));
      const Context context(describe(problem.shape()));
      for (const Queue& queue : kernel_queues()) {
        const Context queue_context(describe(queue));
        run_guarded([&] {
          const Run run(problem, queue, placement);
          for (DataType type : kFloatTypes) {
            for (Layout layout : kLayouts) {
              run.check({.out_type = type,
                         .out_layout = layout,
                         .scale = true,
                         .bias = true,
                         .residual = type});
            }
          }
          run.check({.out_type = DataType::kBits, .scale = true});
          run.check({});
        });
      }
    }
  }
}

TEST(Conv2d, RandomShapesMatchReference) {
  for (uint64_t seed = 0; seed < 250; ++seed) {
    Random random(seed);
    const Conv2dShape shape = random_shape(random);
    const Problem problem(shape, seed);
    check_on_every_kernel(problem, {{}, random_epilogue(random)});
    if (!random.one_in(2)) continue;
    const Context context(describe(shape));
    for (const Queue& queue : kernel_queues(shape)) {
      const Context queue_context(describe(queue));
      run_guarded([&] { check_random_values(problem, queue, seed); });
    }
  }
}

// The five layers of the original CUTLASS module's test, with small batches.
TEST(Conv2dSeed, LayersMatchReference) {
  struct Layer {
    int64_t batch, in_channels, out_channels, kernel, stride, pad, size;
  };
  for (const Layer& layer : {Layer{1, 1024, 32, 3, 2, 2, 64}, Layer{2, 1024, 64, 1, 2, 0, 56},
                             Layer{1, 1024, 64, 3, 1, 1, 64}, Layer{1, 2048, 64, 1, 1, 0, 64}}) {
    Conv2dShape shape = with_pads(
        shape_3x3(layer.batch, layer.in_channels, layer.size, layer.size, layer.out_channels),
        layer.pad, layer.pad, layer.pad, layer.pad);
    shape.weight.kernel_height = shape.weight.kernel_width = layer.kernel;
    shape.stride_height = shape.stride_width = layer.stride;
    check_on_every_kernel(Problem(shape),
                          {{.out_type = DataType::kFloat32, .out_layout = Layout::kNCHW}});
  }
}

TEST(Conv2dSeed, LargestLayerMatchesReference) {
  Conv2dShape shape = shape_3x3(1, 4096, 128, 128, 128);
  shape.weight.kernel_height = shape.weight.kernel_width = 5;
  const Problem problem(shape);
  const Context context(describe(shape));
  const Queue& queue = queues().back();
  run_guarded([&] { Run(problem, queue).check({}); });
}

TEST(Conv2dExtreme, AllMatchesAndAllMismatchesGivePlusAndMinusK) {
  Conv2dShape shape = shape_3x3(1, 4096, 6, 5, 3);
  shape.weight.kernel_height = shape.weight.kernel_width = 5;
  for (int x : {1, -1}) {
    for (int weight : {1, -1}) {
      for (int pad_value : kPadValues) {
        shape.pad_value = pad_value;
        check_on_every_kernel(Problem::constant(shape, x, weight));
      }
    }
  }
  check_on_every_kernel(Problem(shape, 5), kSumsAndBits);
}

TEST(Conv2dExtreme, SumsBeyond24BitsAreExactAndRoundOnceToFloat) {
  Conv2dShape shape = with_pads(shape_3x3(1, (int64_t{1} << 24) + 3, 1, 1, 1), 0, 0, 0, 0);
  shape.weight.kernel_height = shape.weight.kernel_width = 1;
  for (const auto& [x, weight] : std::vector<std::pair<int, int>>{{1, 1}, {-1, -1}, {-1, 1}}) {
    check_on_every_kernel(
        Problem::constant(shape, x, weight),
        {{}, {.out_type = DataType::kFloat32}, {.out_type = DataType::kBFloat16}});
  }
}

TEST(Conv2dExtreme, LargestSumIsExact) {
  // One sum of 2^30 - 1 bits: an intermediate that does not fit into an int32 shows.
  constexpr int64_t kBits = (int64_t{1} << 30) - 1;
  constexpr int64_t kMostMemory = int64_t{3} << 30;
  const Conv2dShape shape{
      .batch = 1,
      .in_height = 1,
      .in_width = 1,
      .weight = {.out_channels = 1, .in_channels = kBits, .kernel_height = 1, .kernel_width = 1}};
  std::vector<uint8_t> ones(packed_bytes(kBits), 0xff);
  ones.back() = 0x7f;
  const std::vector<uint8_t> zeros(packed_bytes(kBits), 0);
  bool has_run = false;
  for (const Queue& queue : kernel_queues(shape)) {
    if (queue.threads() > 1) continue;
    const Context context(describe(queue));
    const int64_t prepared_bytes = prepared_weight_bytes(shape.weight, queue);
    if (prepared_bytes > kMostMemory) {
      std::printf("  not on %s, which prepares %lld bytes\n", queue.kernel(),
                  static_cast<long long>(prepared_bytes));
      continue;
    }
    has_run = true;
    run_guarded([&] {
      const Buffer packed(queue, ones, 16), prepared(queue, prepared_bytes, 16);
      const Buffer output(queue, 4, 4), workspace(queue, workspace_bytes(shape, queue), 16);
      prepare_weight(shape.weight, packed.data(), prepared.data(), queue);
      for (bool match : {true, false}) {
        const Buffer input(queue, match ? ones : zeros, 16);
        binary_conv2d(shape, input.data(), prepared.data(), {.out_type = DataType::kInt32},
                      output.data(), workspace.data(), queue);
        CHECK_EQ(output.read_as<int>()[0], match ? kBits : -kBits);
      }
    });
  }
  if (!has_run) throw Skip{"takes too much memory"};
}

TEST(Conv2dEpilogue, EveryCombinationMatchesReference) {
  Conv2dShape shape = shape_3x3(2, 40, 5, 7, 21);
  const Problem problem(shape, 3), aligned(shape_3x3(1, 128, 4, 8, 64), 4);
  std::vector<EpilogueCase> cases = {{.out_layout = Layout::kNHWC}, {.out_layout = Layout::kNCHW}};
  for (bool scale : {false, true}) {
    for (bool bias : {false, true}) {
      std::vector<std::optional<DataType>> residuals = {std::nullopt};
      residuals.insert(residuals.end(), std::begin(kFloatTypes), std::end(kFloatTypes));
      for (const std::optional<DataType>& residual : residuals) {
        for (DataType type : kFloatTypes) {
          for (Layout layout : kLayouts) {
            cases.push_back({.out_type = type,
                             .out_layout = layout,
                             .scale = scale,
                             .bias = bias,
                             .residual = residual});
          }
        }
        for (auto thresholds :
             {EpilogueCase::Thresholds::kScalar, EpilogueCase::Thresholds::kPerChannel}) {
          cases.push_back({.out_type = DataType::kBits,
                           .scale = scale,
                           .bias = bias,
                           .residual = residual,
                           .thresholds = thresholds});
        }
      }
    }
  }
  check_on_every_kernel(problem, cases);
  check_on_every_kernel(aligned, cases);
}

TEST(Conv2dEpilogue, EveryActivationAndEveryPlaceOfTheBitsMatchesReference) {
  const Problem problem(shape_3x3(1, 40, 3, 5, 21), 5), aligned(shape_3x3(1, 128, 3, 4, 64), 6);
  std::vector<EpilogueCase> cases = {{.clamp = true}, {.out_layout = Layout::kNCHW, .clamp = true}};
  std::vector<std::optional<EpilogueCase::Activation>> activations = {std::nullopt};
  for (int set = 0; set < 8; ++set) {
    activations.push_back({{(set & 1) != 0, (set & 2) != 0, (set & 4) != 0}});
  }
  for (const auto& activation : activations) {
    for (int set = 0; set < 16; ++set) {
      EpilogueCase e{.clamp = (set & 1) != 0, .scale = true, .bias = true};
      if (set & 2) e.residual = DataType::kFloat16;
      e.activation = activation;
      if (set & 4) e.thresholds = EpilogueCase::Thresholds::kPerChannel;
      e.below = (set & 8) != 0;
      e.out_type = DataType::kBits;
      cases.push_back(e);
      for (DataType type : kFloatTypes) {
        for (Layout layout : kLayouts) {
          e.out_type = type;
          e.out_layout = layout;
          e.bits_beside = true;
          cases.push_back(e);
          e.bits_beside = false;
          if (set < 4) cases.push_back(e);
        }
      }
    }
  }
  check_on_every_kernel(problem, cases);
  check_on_every_kernel(aligned, cases);
}

TEST(Conv2dEpilogue, BitsForEveryOutputChannelCountLeaveUnusedBitsZero) {
  for (int64_t out_channels : {1, 7, 8, 9, 31, 33, 63, 64, 65, 96, 127, 128, 129, 200, 256, 300}) {
    check_on_every_kernel(Problem(shape_3x3(1, 16, 3, 5, out_channels), 8),
                          {kSumsAndBits[1],
                           {.out_type = DataType::kBits},
                           {.out_type = DataType::kFloat16, .bits_beside = true}});
  }
}

// A call on one pixel whose sums are +3 in even and -3 in odd channels: y, and the bits of y >= 0
// in channels below 16, else of y <= 0.
struct ByHand {
  ByHand(const Queue& queue, int64_t channels, Epilogue epilogue) {
    const Conv2dShape shape{
        .batch = 1,
        .in_height = 1,
        .in_width = 1,
        .weight = {
            .out_channels = channels, .in_channels = 3, .kernel_height = 1, .kernel_width = 1}};
    std::vector<uint8_t> x(16, 0), weight(16 * channels, 0), below(channels, 0);
    x[0] = 0b111;
    for (int64_t o = 0; o < channels; o += 2) weight[16 * o] = 0b111;
    for (int64_t o = 16; o < channels; ++o) below[o] = 1;
    const std::shared_ptr<Buffer> prepared = prepare(shape.weight, weight, queue);
    const Buffer input(queue, x, 16), directions(queue, below, 1), packed(queue, 16, 16);
    const Buffer output(queue, channels * 4, 4),
        workspace(queue, workspace_bytes(shape, queue), 16);
    epilogue.threshold_below = directions.as<uint8_t>();
    epilogue.bits = packed.data();
    binary_conv2d(shape, input.data(), prepared->data(), epilogue, output.data(), workspace.data(),
                  queue);
    y = output.read_as<float>();
    bits = packed.read();
  }

  int bit(int64_t o) const { return (bits[o / 8] >> (o % 8)) & 1; }

  std::vector<float> y;
  std::vector<uint8_t> bits;
};

TEST(Conv2dEpilogue, ActivationRoundsItsProductBeforeTheShift) {
  // 3 * float(1/3) is a little more than 1 and rounds to 1; a fused sum would keep the rest.
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const Buffer slope(queue, std::vector<float>(40, 1.0f / 3), 4);
    const Buffer shift(queue, std::vector<float>(40, 1.0f), 4);
    const ByHand call(
        queue, 40,
        {.activation = {
             .enabled = true, .slope = slope.as<float>(), .out_shift = shift.as<float>()}});
    for (int64_t o = 0; o < 40; ++o) CHECK_EQ(call.y[o], o % 2 == 0 ? 4.0f : 0.0f);
  }
}

TEST(Conv2dEpilogue, NullShiftKeepsTheSignOfZeroThatAZeroShiftLoses) {
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const Buffer minus_zeros(queue, std::vector<float>(40, -0.0f), 4);
    const Buffer zeros(queue, std::vector<float>(40, 0.0f), 4);
    const auto sign_of_zero = [&](const float* in_shift, const float* slope,
                                  const float* out_shift) {
      // fma(3, -0, -0) is -0.
      const ByHand call(queue, 40,
                        {.scale = minus_zeros.as<float>(),
                         .bias = minus_zeros.as<float>(),
                         .activation = {true, in_shift, slope, out_shift}});
      for (int64_t o = 0; o < 40; ++o) {
        CHECK_EQ(call.y[o], 0.0f);
        CHECK_EQ(call.bit(o), 1);  // Both directions hold for either zero.
      }
      return std::signbit(call.y[0]);
    };
    const float* const zero = zeros.as<float>();
    CHECK(sign_of_zero(nullptr, nullptr, nullptr));
    CHECK(sign_of_zero(nullptr, zero, nullptr));
    CHECK(sign_of_zero(minus_zeros.as<float>(), nullptr, minus_zeros.as<float>()));
    CHECK(!sign_of_zero(zero, nullptr, nullptr));
    CHECK(!sign_of_zero(nullptr, nullptr, zero));
  }
}

TEST(Conv2dEpilogue, NaNPassesTheActivationAndGivesNoBitInEitherDirection) {
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const Buffer bias(queue, std::vector<float>(40, nan), 4);
    const Buffer ones(queue, std::vector<float>(40, 1.0f), 4);
    for (const float* slope : {static_cast<const float*>(nullptr), ones.as<const float>()}) {
      const ByHand call(queue, 40,
                        {.bias = bias.as<float>(), .activation = {true, nullptr, slope, nullptr}});
      for (int64_t o = 0; o < 40; ++o) {
        CHECK(std::isnan(call.y[o]));
        CHECK_EQ(call.bit(o), 0);
      }
    }
  }
}

TEST(Conv2dEpilogue, BitsAreTakenBeforeTheOutputIsRounded) {
  // 3 + 2^-10 is above the threshold, and rounds to 3 in bfloat16.
  const Problem problem = Problem::constant(
      {.batch = 1,
       .in_height = 1,
       .in_width = 1,
       .weight = {.out_channels = 9, .in_channels = 3, .kernel_height = 1, .kernel_width = 1}},
      1, 1);
  const float above = 3.0f + 0x1p-10f;
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const std::shared_ptr<Buffer> prepared =
        prepare(problem.shape().weight, problem.packed_weight(), queue);
    const Buffer input(queue, problem.packed_input(), 16), output(queue, 9 * 2, 2);
    const Buffer workspace(queue, workspace_bytes(problem.shape(), queue), 16);
    const Buffer bias(queue, std::vector<float>(9, 0x1p-10f), 4), bits(queue, 16, 16);
    binary_conv2d(problem.shape(), input.data(), prepared->data(),
                  {.out_type = DataType::kBFloat16,
                   .bias = bias.as<float>(),
                   .threshold = {above},
                   .bits = bits.data()},
                  output.data(), workspace.data(), queue);
    CHECK_EQ(reference::load(DataType::kBFloat16, output.read().data(), 8), 3.0f);
    std::vector<uint8_t> expected(16, 0);
    expected[0] = 0xff;
    expected[1] = 0x01;
    CHECK_EQ(bits.read(), expected);
  }
}

TEST(Conv2dEpilogue, NegativeScaleFlipsTheBits) {
  const Problem problem(shape_3x3(1, 33, 4, 4, 9), 2);
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const std::shared_ptr<Buffer> prepared =
        prepare(problem.shape().weight, problem.packed_weight(), queue);
    const Buffer input(queue, problem.packed_input(), 16), output(queue, 16 * 16, 16);
    const Buffer workspace(queue, workspace_bytes(problem.shape(), queue), 16);
    for (float sign : {1.0f, -1.0f}) {
      const Buffer scale(queue, std::vector<float>(9, 0.5f * sign), 4);
      binary_conv2d(problem.shape(), input.data(), prepared->data(),
                    {.out_type = DataType::kBits, .scale = scale.as<float>(), .threshold = {1.5f}},
                    output.data(), workspace.data(), queue);
      const std::vector<uint8_t> got = output.read();
      for (int64_t pixel = 0; pixel < 16; ++pixel) {
        for (int64_t o = 0; o < 9; ++o) {
          const bool bit = (got[pixel * 16 + o / 8] >> (o % 8)) & 1;
          CHECK_EQ(bit, sign > 0 ? problem.acc(pixel, o) >= 3 : problem.acc(pixel, o) <= -3);
        }
      }
    }
  }
}

TEST(PreparedWeight, ServesEveryGeometry) {
  const Conv2dShape base = shape_3x3(1, 72, 9, 9, 34);
  std::vector<Conv2dShape> shapes(6, base);
  shapes[1].in_height = 20;
  shapes[1].in_width = 3;
  shapes[2].stride_height = 2;
  shapes[2].stride_width = 3;
  shapes[3] = with_pads(base, 0, 5, 2, 0);
  shapes[3].pad_value = 1;
  shapes[4] = with_pads(base, 2, 2, 2, 2);
  shapes[4].dilation_height = shapes[4].dilation_width = 2;
  shapes[4].pad_value = -1;
  shapes[5].batch = 4;
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    std::shared_ptr<Buffer> prepared;
    for (const Conv2dShape& shape : shapes) {
      const Problem problem(shape, 21);
      const Context shape_context(describe(shape));
      if (!prepared) prepared = prepare(shape.weight, problem.packed_weight(), queue);
      Run(problem, queue, prepared).check({});
    }
  }
}

TEST(PreparedWeight, ServesEveryThreadCount) {
  if (use_cuda()) throw Skip{"about CPU queues"};
  const Problem problem(shape_3x3(2, 130, 9, 8, 70), 4);
  for (const std::string& name : available_kernels(Queue::cpu())) {
    const std::shared_ptr<Buffer> prepared = prepare(
        problem.shape().weight, problem.packed_weight(), Queue::cpu(2).with_kernel(name.c_str()));
    for (int threads : {1, 2, 3, 5, 16, 64}) {
      const Queue queue = Queue::cpu(threads).with_kernel(name.c_str());
      const Context context(describe(queue));
      Run(problem, queue, prepared).check({});
      Run(problem, queue, prepared).check({.out_type = DataType::kFloat16, .scale = true});
    }
  }
}

TEST(PreparedWeight, ServesAQueueOfMoreThreadsThanThereIsWork) {
  if (use_cuda()) throw Skip{"about CPU queues"};
  const Problem problem(shape_3x3(1, 20, 3, 4, 5));
  Run(problem, Queue::cpu(std::numeric_limits<int>::max())).check({});
}

TEST(PreparedWeight, IsSharedByFourThreadsAtOnce) {
  const Problem problem(shape_3x3(3, 96, 14, 15, 48), 6);
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const std::shared_ptr<Buffer> prepared =
        prepare(problem.shape().weight, problem.packed_weight(), queue);
    synchronize(queue);
    const Buffer input(queue, problem.packed_input(), 16);
    const int64_t output_bytes = reference::element_count(problem.output()) * 4;
    const std::vector<uint8_t> expected = Run(problem, queue, prepared).sums();
    constexpr int kThreads = 4, kCalls = 6;
    std::vector<Queue> own_queues;
    std::vector<std::unique_ptr<Buffer>> outputs, workspaces;
    for (int i = 0; i < kThreads; ++i) {
      own_queues.push_back(sibling_queue(queue));
      workspaces.push_back(
          std::make_unique<Buffer>(queue, workspace_bytes(problem.shape(), queue), 16));
      for (int call = 0; call < kCalls; ++call)
        outputs.push_back(std::make_unique<Buffer>(queue, output_bytes, 4));
    }
    synchronize(queue);
    std::mutex mutex;
    std::string error;
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        try {
          for (int call = 0; call < kCalls; ++call) {
            binary_conv2d(problem.shape(), input.data(), prepared->data(),
                          {.out_type = DataType::kInt32}, outputs[i * kCalls + call]->data(),
                          workspaces[i]->data(), own_queues[i]);
          }
          synchronize(own_queues[i]);
        } catch (const std::exception& caught) {
          const std::lock_guard<std::mutex> lock(mutex);
          error = caught.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(error, std::string());
    for (const auto& output : outputs) {
      output->check_guards("output");
      CHECK_EQ(output->read(), expected);
    }
    for (const auto& workspace : workspaces) workspace->check_guards("workspace");
  }
}

TEST(PreparedWeight, GivesTheSameResultOnEveryRun) {
  const Problem problem(shape_3x3(2, 130, 12, 13, 33), 9);
  for (const Queue& queue : kernel_queues()) {
    const Context context(describe(queue));
    const Run run(problem, queue);
    const std::vector<uint8_t> first = run.sums();
    for (int i = 0; i < 5; ++i) CHECK_EQ(run.sums(), first);
    CHECK_EQ(Run(problem, queue).sums(), first);
  }
}

TEST(KernelName, IsTheForcedOneOrTheFirstAvailable) {
  const Conv2dShape shape = shape_3x3(1, 64, 8, 8, 64);
  for (const Queue& queue : queues()) {
    const std::vector<std::string> names = available_kernels(queue);
    CHECK_EQ(std::string(kernel_name(shape, queue)), names.at(0));
    for (const std::string& name : names) {
      CHECK_EQ(std::string(kernel_name(shape, queue.with_kernel(name.c_str()))), name);
    }
    CHECK_EQ(std::string(
                 kernel_name(shape, queue.with_kernel(names.back().c_str()).with_kernel(nullptr))),
             std::string(kernel_name(shape, queue)));
  }
}

TEST(KernelName, EveryKernelTakesTheLayersOfResidualNetworks) {
  for (int64_t kernel : {1, 3}) {
    for (int64_t stride : {1, 2}) {
      for (int64_t channels : {64, 128, 256, 512}) {
        const int64_t pad = kernel / 2, size = 56 * 64 / channels;
        Conv2dShape shape =
            with_pads(shape_3x3(8, channels, size, size, channels), pad, pad, pad, pad);
        shape.weight.kernel_height = shape.weight.kernel_width = kernel;
        shape.stride_height = shape.stride_width = stride;
        const Context context(describe(shape));
        CHECK_EQ(kernel_queues(shape).size(), kernel_queues().size());
      }
    }
  }
}

TEST(KernelName, UnforcedQueueComputesTheSame) {
  const Problem problem(shape_3x3(2, 70, 9, 9, 21), 12);
  for (const Queue& queue : queues()) {
    const Context context(describe(queue));
    Run(problem, queue).check({});
    Run(problem, queue).check({.out_type = DataType::kBits, .bias = true});
  }
}

TEST(Version, IsSetByTheBuild) {
  CHECK_EQ(std::string(version()), std::string(BINCONV_TEST_VERSION));
}

}  // namespace binconv::test
