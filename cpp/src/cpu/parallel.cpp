#include "cpu/parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace binconv::cpu {

// Threads live for one call only: there is no pool to own, to fork with, or to spin beside the
// caller's.
void run_chunks(int threads, int64_t count, int64_t chunk, const void* body,
                void (*call)(const void* body, int worker, int64_t begin, int64_t end)) {
  const int64_t chunks = ceil_div(count, chunk);
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      call(body, worker, i * chunk, std::min(count, (i + 1) * chunk));
    }
  };
  std::vector<std::jthread> helpers;
  try {
    for (int worker = 1; worker < worker_count(threads, count, chunk); ++worker) {
      helpers.emplace_back(work, worker);
    }
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do all the work.
  }
  work(0);
}

}  // namespace binconv::cpu
