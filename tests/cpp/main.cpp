#include <cstdio>
#include <cstring>

#include "device.h"
#include "test.h"

// binconv_tests [--device=cpu|cuda] [--list] [Suite | Suite.Name]...
// Exit status: 0 passed, 1 failed, 77 all skipped.

using namespace binconv::test;

namespace {

bool is_selected(const TestCase& test, const std::vector<std::string>& filters) {
  for (const std::string& filter : filters) {
    if (filter == test.suite || filter == test.suite + "." + test.name) return true;
  }
  return filters.empty();
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kAllSkipped = 77;
  bool list = false;
  std::vector<std::string> filters;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      list = true;
    } else if (argument == "--device=cpu" || argument == "--device=cuda") {
      use_cuda() = argument == "--device=cuda";
    } else if (argument[0] == '-') {
      std::fprintf(stderr, "%s: unknown option\n", argv[i]);
      return 1;
    } else {
      filters.push_back(argument);
    }
  }
  report_crashes();
  try {
    if (!list) queues();
  } catch (const Skip& skip) {
    std::printf("SKIPPED: %s\n", skip.reason.c_str());
    return kAllSkipped;
  }

  int passed = 0, failed = 0, skipped = 0;
  for (const TestCase& test : registry()) {
    if (!is_selected(test, filters)) continue;
    const std::string name = test.suite + "." + test.name;
    if (list) {
      std::printf("%s\n", name.c_str());
      ++passed;
      continue;
    }
    const int64_t failures_before = failure_count();
    try {
      run_guarded(test.body);
    } catch (const Skip& skip) {
      std::printf("SKIPPED %s: %s\n", name.c_str(), skip.reason.c_str());
      ++skipped;
      continue;
    }
    const bool ok = failure_count() == failures_before;
    std::printf("%s %s\n", ok ? "passed " : "FAILED ", name.c_str());
    std::fflush(stdout);
    ++(ok ? passed : failed);
  }
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  if (passed + failed + skipped == 0) std::fprintf(stderr, "no test has such a name\n");
  if (failed > 0 || passed + skipped == 0) return 1;
  return passed == 0 ? kAllSkipped : 0;
}
