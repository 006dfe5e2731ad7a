#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "emulation/cases.h"
#include "test.h"

// binconv_emulation_fuzz [seed] [iterations] [kernel]: random convolutions on the emulated GPU, on
// every kernel or on the one named, or with "bits" random images packed and unpacked. Iteration i
// is drawn from seed + i alone. Without a seed, or with 0, it is a fresh one.

using namespace binconv::test;

int main(int argc, char** argv) {
  uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const int64_t iterations = argc > 2 ? std::atoll(argv[2]) : 100;
  use_cuda() = true;
  const std::vector<std::string> kernels =
      argc > 3 ? std::vector<std::string>{argv[3]} : binconv::available_kernels(queues()[0]);
  if (seed == 0) seed = std::random_device()();
  report_crashes();
  std::printf("binconv_emulation_fuzz %" PRIu64 " %" PRId64 "\n", seed, iterations);
  std::fflush(stdout);
  int64_t failed = 0;
  for (int64_t i = 0; i < iterations; ++i) {
    const int64_t failures_before = failure_count();
    for (const std::string& kernel : kernels) {
      if (kernel == "bits") {
        binconv::emulation::check_random_bits(seed + i);
      } else {
        binconv::emulation::check_random_conv2d(kernel.c_str(), seed + i);
      }
    }
    if (failure_count() > failures_before) ++failed;
  }
  std::printf("%" PRId64 " of %" PRId64 " iterations failed\n", failed, iterations);
  return failed == 0 ? 0 : 1;
}
