#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "conv2d_check.h"
#include "test.h"
#include "weight_check.h"

// binconv_fuzz [seed] [iterations] [cpu|cuda]: random shapes, epilogues and memory placements on
// every kernel. Iteration i is drawn from seed + i alone. Without a seed, or with 0, it is a fresh
// one.

using namespace binconv::test;

namespace {

void fuzz_one(uint64_t seed) {
  Random random(seed);
  const binconv::Conv2dShape shape = random_shape(random);
  const Context context("seed " + std::to_string(seed) + ": " + describe(shape));
  const Problem problem(shape, seed);
  const auto placement = random.pick({Placement::kStart, Placement::kEnd, Placement::kOffEnd});
  const EpilogueCase first = random_epilogue(random), second = random_epilogue(random);
  const bool with_values = random.one_in(2), with_weight = random.one_in(2);
  for (const binconv::Queue& queue : kernel_queues(shape)) {
    const Context queue_context(describe(queue));
    run_guarded([&] {
      const Run run(problem, queue, placement);
      run.check({});
      run.check(first);
      run.check(second);
      if (with_values) check_random_values(problem, queue, seed);
      if (with_weight) check_random_weight(shape.weight, queue, seed);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;
  uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const int64_t iterations = argc > 2 ? std::atoll(argv[2]) : 300;
  use_cuda() = argc > 3 && std::strcmp(argv[3], "cuda") == 0;
  if (seed == 0) seed = std::random_device()();
  report_crashes();
  std::printf("binconv_fuzz %llu %lld\n", static_cast<unsigned long long>(seed),
              static_cast<long long>(iterations));
  std::fflush(stdout);
  int64_t failed = 0;
  try {
    for (int64_t i = 0; i < iterations; ++i) {
      const int64_t failures_before = failure_count();
      run_guarded([&] { fuzz_one(seed + i); });
      if (failure_count() > failures_before) ++failed;
    }
  } catch (const Skip& skip) {
    std::printf("SKIPPED: %s\n", skip.reason.c_str());
    return kSkipped;
  }
  std::printf("%lld of %lld iterations failed\n", static_cast<long long>(failed),
              static_cast<long long>(iterations));
  return failed == 0 ? 0 : 1;
}
