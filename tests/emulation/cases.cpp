#include "emulation/cases.h"

#include <algorithm>
#include <string>

#include "conv2d_check.h"
#include "cuda/halo.h"
#include "emulation/gpu.h"
#include "test.h"
#include "weight_check.h"

namespace binconv::emulation {
namespace {

using namespace test;

WeightShape random_weight(Random& random) {
  WeightShape weight;
  weight.in_channels =
      random.one_in(3) ? random.between(1, 600)
                       : random.pick<int64_t>({1, 8, 31, 33, 64, 96, 127, 128, 130, 256, 384, 512});
  weight.out_channels = random.pick<int64_t>({1, 7, 8, 33, 64, 96, 128, 129, 130, 200, 256});
  weight.kernel_height = random.pick<int64_t>({1, 2, 3, 3, 3, 4, 5, 7});
  weight.kernel_width = random.one_in(3) ? random.between(1, 8) : weight.kernel_height;
  if (random.one_in(12)) {
    weight.in_channels = random.between(4097, 9000);
    weight.kernel_height = weight.kernel_width = random.between(1, 3);
  } else if (random.one_in(12)) {
    weight.kernel_height = random.between(1, 11);
    weight.kernel_width = std::min<int64_t>(random.between(1, 11), 128 / weight.kernel_height);
  } else if (random.one_in(6)) {
    weight.groups = random.between(2, 4);
    weight.in_channels = weight.groups * 128 * random.between(1, 3);
    weight.out_channels = weight.groups * random.pick<int64_t>({64, 128, 192});
  }
  return weight;
}

int64_t random_extent(Random& random) {
  if (random.one_in(100)) return random.between(100, 300);
  return random.one_in(20) ? random.pick<int64_t>({28, 56}) : random.between(1, 20);
}

// Of those that tensor cores take, which test::random_shape seldom draws.
Conv2dShape random_tensor_core_shape(Random& random, const cuda::HaloLimits& limits,
                                     int64_t max_work) {
  constexpr int64_t kMaxValues = 10'000'000;
  for (;;) {
    Conv2dShape s;
    s.weight = random_weight(random);
    s.batch = random.between(1, random.one_in(2) ? 4 : 20);
    s.in_height = random_extent(random);
    s.in_width = random.one_in(3) ? s.in_height : random_extent(random);
    s.stride_height = random.one_in(2) ? 1 : random.between(1, 3);
    s.stride_width = random.one_in(4) ? random.between(1, 8) : s.stride_height;
    s.dilation_height = random.one_in(3) ? random.between(1, 3) : 1;
    s.dilation_width = random.one_in(3) ? random.between(1, 3) : 1;
    s.pad_top = random.between(0, 4), s.pad_left = random.between(0, 4);
    s.pad_bottom = random.between(0, 4), s.pad_right = random.between(0, 4);
    if (random.one_in(2)) {
      s.pad_top = s.pad_bottom = (s.weight.kernel_height - 1) * s.dilation_height / 2;
      s.pad_left = s.pad_right = (s.weight.kernel_width - 1) * s.dilation_width / 2;
    }
    s.pad_value = static_cast<int>(random.between(-1, 1));
    if (s.out_height() < 1 || s.out_width() < 1) continue;
    if (!cuda::halo_accepts(s, limits)) continue;
    const int64_t group_channels = s.weight.in_channels / s.weight.groups;
    const int64_t window = group_channels * s.weight.kernel_height * s.weight.kernel_width;
    const int64_t pixels = s.batch * s.out_height() * s.out_width();
    const int64_t values = s.batch * s.in_height * s.in_width * s.weight.in_channels;
    if (pixels * s.weight.out_channels * window > max_work || values > kMaxValues) continue;
    return s;
  }
}

// Warps multiply slowly here: their lanes meet for every instruction.
Conv2dShape shape_for(const std::string& kernel, Random& random) {
  if (kernel == "cuda_sm90") {
    cuda::HaloLimits limits = cuda::kSm90Limits;
    limits.shared_bytes = device().shared_bytes;
    return random_tensor_core_shape(random, limits, 300'000'000);
  }
  if (kernel == "cuda_sm80") {
    return random_tensor_core_shape(random, cuda::kSm80Limits, 10'000'000);
  }
  return random_shape(random);
}

Device random_device(Random& random, uint64_t seed) {
  return {.multiprocessors = random.pick({132, 132, 16, 7, 3, 1}),
          .shared_bytes = random.pick({227, 227, 163, 99}) * 1024,
          .seed = seed,
          .draws_plans = random.one_in(2)};
}

Problem random_problem(Random& random, const Conv2dShape& shape, uint64_t seed) {
  constexpr int64_t kWork = 20'000'000;
  if (!random.one_in(8)) return Problem(shape, seed, kWork);
  return Problem::constant(shape, random.pick({-1, 1}), random.pick({-1, 1}), kWork);
}

// What most calls ask for, and seldom drawn among all.
EpilogueCase common_epilogue(Random& random) {
  EpilogueCase e;
  e.out_type =
      random.pick({DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32, DataType::kBits});
  e.scale = random.one_in(2);
  e.bias = random.one_in(2);
  if (e.out_type == DataType::kBits) {
    e.clamp = random.one_in(4);
    if (random.one_in(2)) e.thresholds = EpilogueCase::Thresholds::kPerChannel;
    e.below = random.one_in(2);
  } else if (random.one_in(3)) {
    e.residual = e.out_type;
    e.bits_beside = random.one_in(2);
  }
  return e;
}

std::string describe(const char* kernel, uint64_t seed, const Conv2dShape& shape) {
  return std::string(kernel) + ", seed " + std::to_string(seed) + ": " + test::describe(shape) +
         ", on " + std::to_string(device().multiprocessors) + " multiprocessors with " +
         std::to_string(device().shared_bytes) + " bytes of shared memory" +
         (device().draws_plans ? ", any plan" : "");
}

}  // namespace

void check_random_conv2d(const char* kernel, uint64_t seed) {
  Random random(seed);
  device() = random_device(random, seed);
  const Conv2dShape shape = shape_for(kernel, random);
  const Context context(describe(kernel, seed, shape));
  run_guarded([&] {
    const Problem problem = random_problem(random, shape, seed);
    const auto placement = random.pick({Placement::kStart, Placement::kEnd, Placement::kOffEnd});
    const Queue queue = queues()[0].with_kernel(kernel);
    const Run run(problem, queue, placement);
    run.check(random.one_in(2) ? common_epilogue(random) : random_epilogue(random));
    if (random.one_in(2)) check_random_values(problem, queue, seed);
    if (random.one_in(4)) check_random_weight(shape.weight, queue, seed);
  });
}

void check_random_pointwise(const char* kernel, uint64_t seed) {
  Random random(seed);
  device() = random_device(random, seed);
  const Conv2dShape shape = random_pointwise_shape(random);
  const Context context(describe(kernel, seed, shape));
  run_guarded([&] {
    const Problem problem = random_problem(random, shape, seed);
    const auto placement = random.pick({Placement::kStart, Placement::kEnd, Placement::kOffEnd});
    const Run run(problem, queues()[0].with_kernel(kernel), placement);
    const DataType type =
        random.pick({DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16});
    run.check_values(random.one_in(2) ? common_epilogue(random) : random_epilogue(random), type,
                     Layout::kNHWC, random.one_in(2));
  });
}

}  // namespace binconv::emulation
