#pragma once

#include <algorithm>
#include <cstdint>

namespace binconv::cpu {

// call(body, worker, begin, end) for chunks that cover [0, count), each once; see parallel_for.
void run_chunks(int threads, int64_t count, int64_t chunk, const void* body,
                void (*call)(const void* body, int worker, int64_t begin, int64_t end));

namespace {  // Each instruction set compiles its own copy.

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// Items per chunk so that a chunk is worth handing to a thread: waking one can cost some tens of
// microseconds, in which a core does about this many of the simple steps that callers count.
inline int64_t chunk_for(int64_t steps_per_item) {
  constexpr int64_t kStepsPerChunk = int64_t{1} << 17;
  return std::max<int64_t>(1, kStepsPerChunk / std::max<int64_t>(1, steps_per_item));
}

// The threads that parallel_for runs on.
inline int worker_count(int threads, int64_t count, int64_t chunk) {
  return static_cast<int>(std::min<int64_t>(threads, ceil_div(count, chunk)));
}

// body(worker, begin, end) for chunks that cover [0, count), each once. worker < worker_count(...)
// tells the threads apart, of which the calling one is one.
template <class Body>
void parallel_for(int threads, int64_t count, int64_t chunk, const Body& body) {
  run_chunks(threads, count, chunk, &body,
             [](const void* object, int worker, int64_t begin, int64_t end) {
               (*static_cast<const Body*>(object))(worker, begin, end);
             });
}

}  // namespace
}  // namespace binconv::cpu
