#include "test.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>

namespace binconv::test {
namespace {

constexpr int64_t kPrintedFailures = 40;

std::vector<std::string>& contexts() {
  static std::vector<std::string> stack;
  return stack;
}

int64_t& failures() {
  static int64_t count = 0;
  return count;
}

void print_contexts() {
  for (const std::string& text : contexts()) std::fprintf(stderr, "    in %s\n", text.c_str());
}

void on_crash(int signal) {
  std::fprintf(stderr, "CRASH: signal %d\n", signal);
  print_contexts();
  std::_Exit(128 + signal);
}

}  // namespace

std::vector<TestCase>& registry() {
  static std::vector<TestCase> tests;
  return tests;
}

void report_failure(const char* file, int line, const std::string& message) {
  const int64_t count = ++failures();
  if (count > kPrintedFailures) return;
  std::fprintf(stderr, "  %s:%d: %s\n", file, line, message.c_str());
  print_contexts();
  if (count == kPrintedFailures) std::fprintf(stderr, "  further failures are only counted\n");
}

int64_t failure_count() { return failures(); }

Context::Context(std::string text) { contexts().push_back(std::move(text)); }

Context::~Context() {
  if (std::uncaught_exceptions() == 0) contexts().pop_back();
}

void run_guarded(const std::function<void()>& body) {
  const size_t depth = contexts().size();
  try {
    body();
  } catch (const Skip&) {
    contexts().resize(depth);
    throw;
  } catch (const std::exception& error) {
    report_failure("unexpected exception", 0, error.what());
    contexts().resize(depth);
  }
}

void report_crashes() {
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) std::signal(signal, on_crash);
}

void check_error(const char* file, int line, const char* expression,
                 const std::function<void()>& call, Status status,
                 const std::vector<std::string>& words) {
  const auto fail = [&](const std::string& what) {
    report_failure(file, line, std::string(expression) + ": " + what);
  };
  try {
    call();
  } catch (const Error& error) {
    const std::string message = error.what();
    if (error.status() != status) {
      fail("got status " + std::to_string(static_cast<int>(error.status())) + ", expected " +
           std::to_string(static_cast<int>(status)) + ", with \"" + message + "\"");
    }
    for (const std::string& word : words) {
      if (message.find(word) == std::string::npos) {
        fail("\"" + message + "\" does not say \"" + word + "\"");
      }
    }
    return;
  } catch (const std::exception& error) {
    return fail(std::string("threw something else than binconv::Error: ") + error.what());
  }
  fail("did not throw");
}

}  // namespace binconv::test
