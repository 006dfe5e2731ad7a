#include "cpu/parallel.h"

#include <atomic>
#include <system_error>
#include <thread>  // Where threads are POSIX threads, it also declares pthread_atfork.
#include <vector>

namespace binconv::cpu {
namespace {

// work(worker) on up to `workers` threads, all of which may do all of the work.
template <class Work>
void run_on_new_threads(int workers, const Work& work) {
  std::vector<std::jthread> helpers;
  try {
    for (int worker = 1; worker < workers; ++worker) helpers.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do all the work.
  }
  work(0);
}

#if defined(_OPENMP)
// The child of a fork() has none of the threads that OpenMP still counts on there, whoever started
// them, and would wait for them for ever.
bool is_forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

// OpenMP's threads are the process's own: PyTorch runs on the same ones, which between two calls
// wait for more work on the very cores that threads of ours would need.
template <class Work>
void run_workers(int workers, const Work& work) {
  if (is_forked) return run_on_new_threads(workers, work);
  std::atomic<int> count{0};
#pragma omp parallel num_threads(workers) if (workers > 1)
  work(count.fetch_add(1, std::memory_order_relaxed));
}
#else
template <class Work>
void run_workers(int workers, const Work& work) {
  run_on_new_threads(workers, work);
}
#endif

}  // namespace

void run_chunks(int threads, int64_t count, int64_t chunk, const void* body,
                void (*call)(const void* body, int worker, int64_t begin, int64_t end)) {
  const int64_t chunks = ceil_div(count, chunk);
  std::atomic<int64_t> next{0};
  run_workers(worker_count(threads, count, chunk), [&](int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      call(body, worker, i * chunk, std::min(count, (i + 1) * chunk));
    }
  });
}

}  // namespace binconv::cpu
