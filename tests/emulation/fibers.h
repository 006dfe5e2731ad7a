#pragma once

#include <csetjmp>
#include <cstdint>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "random.h"

// The threads of one block, as fibers of one host thread. CUDA promises no order between threads,
// so the next one is drawn at random wherever they meet, and warps can be much slower than others.
// Asynchronous work is an action that runs at a later step. Checks that the block ends: threads
// that all wait are a deadlock, reported with the places where they wait.

namespace binconv::emulation {

constexpr int kMaxThreads = 1024;
constexpr int kWarpSize = 32;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kWarpgroup = 128;

// A kernel that does what it must not do.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Failure(message.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// All that happens in a launch is drawn from this.
test::Random& random();
void seed_random(uint64_t seed);

// Runs `body` in every thread of a block until all have returned. Throws Failure.
void run_threads(int threads, const std::function<void()>& body);

int this_thread();  // That calls.

using Waiters = std::vector<int>;

// Leaves the thread waiting until wake(); the caller then looks again at what it waits for. The
// rest is for the report of a deadlock.
void wait_in(Waiters& waiters, const char* place, int64_t first = 0, int64_t second = 0);
void wake(Waiters& waiters);
void yield();

// An action `delay` steps from now.
void run_later(uint64_t delay, std::function<void()> action);
// Of an asynchronous operation: within a block, sometimes all are instant and sometimes some are
// very slow.
uint64_t random_delay();

}  // namespace binconv::emulation
