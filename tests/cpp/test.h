#pragma once

#include <cstdint>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "binconv/error.h"
#include "binconv/types.h"

// A small test harness. TEST(Suite, Name) { ... } registers itself. Checks do not stop a test: it
// goes on to its next case, and each failure is printed with the Contexts it happened in.

namespace binconv::test {

// What many tests go through.
inline constexpr DataType kFloatTypes[] = {DataType::kFloat32, DataType::kFloat16,
                                           DataType::kBFloat16};
inline constexpr DataType kValueTypes[] = {DataType::kFloat32, DataType::kFloat16,
                                           DataType::kBFloat16, DataType::kInt8};
inline constexpr Layout kLayouts[] = {Layout::kNCHW, Layout::kNHWC};

struct TestCase {
  std::string suite;
  std::string name;
  void (*body)();
};

// Throw it to leave a test that cannot run here. It is reported as skipped, never as passed.
struct Skip {
  std::string reason;
};

std::vector<TestCase>& registry();
void report_failure(const char* file, int line, const std::string& message);
int64_t failure_count();

// Names what the checks below it in this scope are about. Tests use it from one thread only.
class Context {
 public:
  explicit Context(std::string text);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

// Runs `body`. An exception becomes a failure that shows the contexts it left; Skip is passed on.
void run_guarded(const std::function<void()>& body);

// Prints the contexts before the process dies of a bad memory access.
void report_crashes();

// Throws a failure message unless `call` throws an Error with this status and all these words.
void check_error(const char* file, int line, const char* expression,
                 const std::function<void()>& call, Status status,
                 const std::vector<std::string>& words);

template <class A, class B>
void check_equal(const char* file, int line, const char* what, const A& got, const B& expected) {
  if (got == expected) return;
  std::ostringstream message;
  message << what << ": got " << got << ", expected " << expected;
  report_failure(file, line, message.str());
}

template <class T>
void check_equal(const char* file, int line, const char* what, const std::vector<T>& got,
                 const std::vector<T>& expected) {
  if (got == expected) return;
  std::ostringstream message;
  message << what << ": ";
  size_t i = 0;
  while (i < got.size() && i < expected.size() && got[i] == expected[i]) ++i;
  if (got.size() != expected.size()) {
    message << "got " << got.size() << " elements, expected " << expected.size();
  } else {
    message << "got " << +got[i] << ", expected " << +expected[i] << " at index " << i << " of "
            << got.size();
  }
  report_failure(file, line, message.str());
}

}  // namespace binconv::test

#define TEST(suite, name)                                                                     \
  static void test_##suite##_##name();                                                        \
  static const bool registered_##suite##_##name =                                             \
      (::binconv::test::registry().push_back({#suite, #name, &test_##suite##_##name}), true); \
  static void test_##suite##_##name()

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      ::binconv::test::report_failure(__FILE__, __LINE__, "expected " #condition); \
    }                                                                              \
  } while (false)

#define CHECK_EQ(got, expected) \
  ::binconv::test::check_equal(__FILE__, __LINE__, #got, got, expected)

// CHECK_ERROR(call(), Status::kInvalidArgument, "argument", "value got")
#define CHECK_ERROR(expression, status, ...)                                                 \
  ::binconv::test::check_error(__FILE__, __LINE__, #expression, [&] { (void)(expression); }, \
                               status, {__VA_ARGS__})
