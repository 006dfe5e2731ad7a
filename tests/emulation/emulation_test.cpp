#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "conv2d_check.h"
#include "cuda/halo.cuh"
#include "cuda/tile_channels.cuh"
#include "emulation/cases.h"
#include "emulation/copies.h"
#include "emulation/fibers.h"
#include "emulation/gpu.h"
#include "emulation/wgmma.h"
#include "test.h"

// The library's CUDA kernels, compiled for the host, on the emulated GPU; and that the emulation
// notices what a GPU would punish.

namespace binconv::emulation {
namespace {

using namespace test;
using cuda::shared;

void check_random_convolutions(const char* kernel, int count) {
  for (int seed = 1; seed <= count; ++seed) check_random_conv2d(kernel, seed);
}

void check_every_kind_of_plan_was_used() {
  const PlanCounts& counts = plan_counts();
  CHECK(counts.resident_64 > 0);
  CHECK(counts.resident_128 > 0);
  CHECK(counts.streamed > 0);
  CHECK(counts.several_images > 0);
  CHECK(counts.cut_rows > 0);
  CHECK(counts.shared_padding > 0);
}

// Both tensor-core kernels finish sums in the same way, and this one is quicker here.
void check_largest_sums(const char* kernel) {
  device() = kHopper;
  Conv2dShape shape = {
      .batch = 1,
      .in_height = 1,
      .in_width = 1,
      .weight = {.out_channels = 2, .in_channels = 1, .kernel_height = 1, .kernel_width = 1}};
  while (cuda::halo_accepts(shape, cuda::kSm90Limits)) shape.weight.in_channels += 128;
  shape.weight.in_channels = (shape.weight.in_channels - 1) / 128 * 128;
  CHECK(cuda::halo_accepts(shape, cuda::kSm90Limits));
  for (int weight : {-1, 1}) {
    const Problem problem = Problem::constant(shape, 1, weight);
    Run(problem, queues()[0].with_kernel(kernel)).check({});
  }
}

void check_failure(int threads, const char* expected, const std::function<void()>& kernel) {
  constexpr int kSharedBytes = 16 * 1024;
  device() = kHopper;  // Another seed could let copies arrive by themselves.
  std::string message = "none";
  try {
    run_grid(dim3(1), dim3(threads), kSharedBytes, kernel);
  } catch (const Failure& failure) {
    message = failure.what();
  }
  const Context context("the failure \"" + message + "\", expected one with \"" + expected + "\"");
  CHECK(message.find(expected) != std::string::npos);
}

constexpr uint64_t kOperand = uint64_t{128 >> 4} << 32 | uint64_t{1024 >> 4} << 16 | 1024 >> 4;

}  // namespace

TEST(EmulatedBits, RandomImagesMatchReference) {
  for (int seed = 1; seed <= 200; ++seed) check_random_bits(seed);
}

TEST(EmulatedDirect, RandomShapesMatchReference) { check_random_convolutions("cuda_direct", 100); }

TEST(EmulatedDirect, ServesWhereTheDriverCompilesFromPtx) {
  device() = kHopper;
  const Conv2dShape shape = {
      .batch = 1,
      .in_height = 8,
      .in_width = 8,
      .weight = {.out_channels = 64, .in_channels = 64, .kernel_height = 1, .kernel_width = 1}};
  const auto chosen = [&] { return std::string(kernel_name(shape, queues()[0])); };
  CHECK_EQ(chosen(), std::string("cuda_sm90"));
  setenv("CUDA_FORCE_PTX_JIT", "1", 1);
  CHECK_EQ(chosen(), std::string("cuda_direct"));
  unsetenv("CUDA_FORCE_PTX_JIT");
}

TEST(EmulatedSm80, RandomShapesMatchReference) {
  plan_counts() = {};
  check_random_convolutions("cuda_sm80", 60);
  check_every_kind_of_plan_was_used();
}

TEST(EmulatedSm90, RandomShapesMatchReference) {
  plan_counts() = {};
  check_random_convolutions("cuda_sm90", 100);
  check_every_kind_of_plan_was_used();
  CHECK(plan_counts().resident_32 > 0);
}

TEST(EmulatedPointwise, RandomShapesMatchReference) {
  for (int seed = 1; seed <= 60; ++seed) {
    for (const char* kernel : {"cuda_sm80", "cuda_sm90"}) check_random_pointwise(kernel, seed);
  }
}

// Of any float as well as of those that networks have.
float draw_term(Random& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (random.one_in(2)) return random.uniform(-100.0f, 100.0f);
  if (random.one_in(2)) return std::bit_cast<float>(static_cast<uint32_t>(random.between(0, ~0u)));
  return random.pick({0.0f, -0.0f, 1.0f, -1.0f, 1e-42f, 1e38f, kInfinity, -kInfinity, NAN});
}

TEST(BitLimits, SayForEverySumWhetherItPasses) {
  constexpr int32_t kMaxSum = (1 << 22) / 3;
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const bool clamp = random.one_in(4);
    cuda::ChannelTerms terms;
    do terms.scale = draw_term(random);
    while (std::isinf(terms.scale));  // Left to another path.
    terms.bias = draw_term(random);
    terms.below = random.one_in(2);
    const auto y = [&](int32_t acc) {
      return std::fma(static_cast<float>(clamp ? std::max(acc, 0) : acc), terms.scale, terms.bias);
    };
    const auto draw_sum = [&] { return static_cast<int32_t>(random.between(-kMaxSum, kMaxSum)); };
    terms.threshold = random.one_in(3) ? draw_term(random) : y(draw_sum());
    const cuda::BitLimit found = cuda::find_bit_limit(terms, clamp);
    std::vector<int32_t> sums = {-kMaxSum, -1, 0, 1, kMaxSum, draw_sum(), draw_sum(), draw_sum()};
    for (int32_t near = -2; near <= 2; ++near) sums.push_back(found.limit + near);
    for (const int32_t acc : sums) {
      if (std::abs(acc) > kMaxSum) continue;
      const bool expected = terms.below ? y(acc) <= terms.threshold : y(acc) >= terms.threshold;
      CHECK_EQ((acc >= found.limit) != found.is_flipped, expected);
    }
  }
}

TEST(EmulatedSm90, LargestSumsAreExact) { check_largest_sums("cuda_sm90"); }

TEST(Emulation, ReportsThreadsThatWaitForever) {
  check_failure(64, "threads 0 to 31 wait in named barrier", [] {
    if (threadIdx.x < 32) __syncthreads();
  });
  check_failure(32, "wait in mbarrier wait(64, 0)", [] {
    if (threadIdx.x == 0) init_barrier(shared<void*>(64), 2);
    __syncwarp();
    if (threadIdx.x == 0) arrive(shared<void*>(64));
    wait_for_parity(shared<void*>(64), 0);
  });
  check_failure(384, "wait in setmaxnreg.inc", [] { take_registers(208); });
}

TEST(Emulation, ReportsWarpsThatDiverge) {
  check_failure(32, "the lanes of a warp are at",
                [] { threadIdx.x == 0 ? void(__shfl_sync(~0u, 1, 0)) : __syncwarp(); });
}

TEST(Emulation, ReportsMisusedBarriers) {
  check_failure(32, "is not initialized", [] { arrive(shared<void*>(0)); });
  check_failure(32, "is initialized twice", [] { init_barrier(shared<void*>(0), 32); });
  check_failure(32, "is not aligned to 8", [] { init_barrier(shared<void*>(4), 32); });
  check_failure(32, "was overwritten", [] {
    if (threadIdx.x == 0) init_barrier(shared<void*>(0), 32);
    __syncwarp();
    if (threadIdx.x == 0) *shared<uint32_t>(4) = 1;
  });
  check_failure(32, "too many arrivals", [] {
    if (threadIdx.x > 0) return;
    init_barrier(shared<void*>(0), 1);
    expect_bytes(shared<void*>(0), 16);
    arrive(shared<void*>(0));
    arrive(shared<void*>(0));
  });
}

TEST(Emulation, ReportsAccessBeyondSharedMemory) {
  check_failure(32, "written beyond shared memory", [] { *shared<int>(16 * 1024) = 1; });
  alignas(16) static constexpr uint8_t kBytes[32] = {};
  check_failure(32, "beyond 16384 bytes", [] {
    if (threadIdx.x > 0) return;
    init_barrier(shared<void*>(0), 1);
    copy_bulk(kBytes, shared<void*>(0), shared<void*>(16 * 1024 - 16), 32);
  });
  check_failure(kWarpgroup, "wgmma touches", [] {
    int32_t d[32];
    fence_accumulators();
    multiply_async(d, 64, false, kOperand, kOperand + 960);
  });
}

TEST(Emulation, ReportsCopiesAndMultiplicationsThatNobodyWaitsFor) {
  alignas(16) static constexpr uint8_t kBytes[16] = {};
  check_failure(32, "copies in flight", [] {
    if (threadIdx.x > 0) return;
    init_barrier(shared<void*>(0), 1);
    copy_bulk(kBytes, shared<void*>(0), shared<void*>(16), 16);
  });
  check_failure(kWarpgroup, "multiplications in flight", [] {
    int32_t d[32];
    fence_accumulators();
    multiply_async(d, 64, false, kOperand, kOperand);
    commit_multiplications();
  });
  check_failure(kWarpgroup, "without wgmma.fence", [] {
    int32_t d[32];
    multiply_async(d, 64, false, kOperand, kOperand);
  });
}

TEST(Emulation, RefusesLaunchesThatDoNotFit) {
  device() = kAda;
  const auto launches = [](int shared_bytes, int threads) {
    const cudaLaunchConfig_t config = {.gridDim = 1,
                                       .blockDim = static_cast<unsigned>(threads),
                                       .dynamicSmemBytes = static_cast<size_t>(shared_bytes)};
    return cudaLaunchKernelEx(&config, +[](int) {}, 1) == cudaSuccess;
  };
  CHECK(launches(48 * 1024, 128));
  CHECK(!launches(48 * 1024 + 16, 128));
  CHECK(!launches(0, 2048));
  CHECK_EQ(cudaFuncSetAttribute(
               +[](int) {}, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024),
           cudaErrorInvalidValue);
}

}  // namespace binconv::emulation
