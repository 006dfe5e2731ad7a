// glibc's hardened longjmp takes the other fibers' stacks for an error.
#undef _FORTIFY_SOURCE

#include "emulation/fibers.h"

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>
#include <new>

namespace binconv::emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

enum class State { kUnborn, kIdle, kReady, kRunning, kWaiting };

struct Fiber {
  jmp_buf context;
  State state = State::kUnborn;
  const char* place = "";
  int64_t first = 0, second = 0;

  bool waits_like(const Fiber& other) const {
    return state == other.state && place == other.place && first == other.first &&
           second == other.second;
  }
};

std::array<Fiber, kMaxThreads> fibers;
jmp_buf scheduler_context;
const std::function<void()>* thread_body;
std::string failure;  // Of a fiber.
int current = -1, thread_count = 0, unfinished = 0;

std::array<std::vector<int>, kMaxWarps> ready;
int ready_count = 0;
std::array<int, kMaxWarps> weights;  // How often a warp is chosen.

std::multimap<uint64_t, std::function<void()>> actions;
uint64_t step = 0;
int delay_mode = 0;

void switch_to_scheduler() {
  if (_setjmp(fibers[current].context) == 0) _longjmp(scheduler_context, 1);
}

// Fibers outlive blocks and launches: one that is idle begins the next block's thread.
void fiber_main() {
  for (;;) {
    try {
      (*thread_body)();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    fibers[current].state = State::kIdle;
    --unfinished;
    switch_to_scheduler();
  }
}

uint8_t* stack_of(int thread) {
  static uint8_t* const stacks = [] {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < kMaxThreads; ++i) {
      mprotect(static_cast<uint8_t*>(memory) + i * kStackBytes, sysconf(_SC_PAGESIZE), PROT_NONE);
    }
    return static_cast<uint8_t*>(memory);
  }();
  return stacks + thread * kStackBytes;
}

// ucontext only makes a fiber: its switches are system calls.
void start_fiber(int thread) {
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack_of(thread);
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  if (_setjmp(scheduler_context) == 0) setcontext(&context);
}

void resume_fiber(int thread) {
  if (_setjmp(scheduler_context) == 0) _longjmp(fibers[thread].context, 1);
}

void run_fiber(int thread) {
  const bool is_new = fibers[thread].state == State::kUnborn;
  fibers[thread].state = State::kRunning;
  current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  is_new ? start_fiber(thread) : resume_fiber(thread);
  current = -1;
}

void add_ready(int thread) {
  ready[thread / kWarpSize].push_back(thread);
  ++ready_count;
}

void make_ready(int thread) {
  fibers[thread].state = State::kReady;
  add_ready(thread);
}

void draw_slow_warps() {
  for (int& weight : weights) weight = random().one_in(3) ? 1 : 1000;
}

int take_ready() {
  const int warps = (thread_count + kWarpSize - 1) / kWarpSize;
  int64_t total = 0;
  for (int warp = 0; warp < warps; ++warp) total += ready[warp].empty() ? 0 : weights[warp];
  int64_t pick = random().between(0, total - 1);
  int warp = 0;
  for (;; ++warp) {
    if (ready[warp].empty()) continue;
    pick -= weights[warp];
    if (pick < 0) break;
  }
  std::vector<int>& threads = ready[warp];
  int& chosen = threads[random().between(0, static_cast<int64_t>(threads.size()) - 1)];
  const int thread = chosen;
  chosen = threads.back();
  threads.pop_back();
  --ready_count;
  return thread;
}

[[noreturn]] void fail_deadlock() {
  std::ostringstream text;
  text << "deadlock";
  for (int first = 0, end; first < thread_count; first = end) {
    const Fiber& fiber = fibers[first];
    end = first + 1;
    while (end < thread_count && fibers[end].waits_like(fiber)) ++end;
    text << "\n  threads " << first << " to " << end - 1;
    if (fiber.state == State::kIdle) {
      text << " are done";
    } else {
      text << " wait in " << fiber.place << "(" << fiber.first << ", " << fiber.second << ")";
    }
  }
  fail(text.str());
}

void run_due_actions() {
  while (!actions.empty() && (actions.begin()->first <= step || ready_count == 0)) {
    const auto node = actions.extract(actions.begin());
    step = std::max(step, node.key());
    node.mapped()();
  }
}

void schedule(bool has_slow_warps) {
  constexpr int kSlowSteps = 2000;
  while (unfinished > 0) {
    run_due_actions();
    if (ready_count == 0) fail_deadlock();
    ++step;
    if (has_slow_warps && random().one_in(kSlowSteps)) draw_slow_warps();
    const int thread = take_ready();
    run_fiber(thread);
    if (!failure.empty()) fail(failure, " (thread ", thread, ")");
  }
}

// A block that failed leaves fibers in the middle of their kernel: they start anew.
void reset() {
  failure.clear();
  actions.clear();
  for (std::vector<int>& threads : ready) threads.clear();
  ready_count = 0;
  step = 0;
  for (Fiber& fiber : fibers) {
    if (fiber.state != State::kIdle) fiber.state = State::kUnborn;
    fiber.place = "";
    fiber.first = fiber.second = 0;
  }
}

}  // namespace

test::Random& random() {
  static test::Random generator(0);
  return generator;
}

void seed_random(uint64_t seed) { random() = test::Random(seed); }

int this_thread() { return current; }

void run_threads(int threads, const std::function<void()>& body) {
  reset();
  thread_count = unfinished = threads;
  thread_body = &body;
  delay_mode = static_cast<int>(random().between(0, 3));
  const bool has_slow_warps = random().one_in(3);
  const bool is_even = random().one_in(2);
  for (int& weight : weights) weight = is_even ? 1 : static_cast<int>(random().between(1, 40));
  if (has_slow_warps) draw_slow_warps();
  for (int thread = 0; thread < threads; ++thread) add_ready(thread);
  schedule(has_slow_warps);
}

void wait_in(Waiters& waiters, const char* place, int64_t first, int64_t second) {
  Fiber& fiber = fibers[current];
  fiber.state = State::kWaiting;
  fiber.place = place;
  fiber.first = first;
  fiber.second = second;
  waiters.push_back(current);
  switch_to_scheduler();
}

void wake(Waiters& waiters) {
  for (int thread : waiters) make_ready(thread);
  waiters.clear();
}

void yield() {
  make_ready(current);
  switch_to_scheduler();
}

void run_later(uint64_t delay, std::function<void()> action) {
  actions.emplace(step + delay, std::move(action));
}

uint64_t random_delay() {
  switch (delay_mode) {
    case 0:
      return 0;
    case 1:
      return random().between(0, 30);
    case 2:
      return random().between(0, random().one_in(4) ? 4000 : 200);
    default:
      return random().between(0, random().one_in(20) ? 20000 : 10);
  }
}

}  // namespace binconv::emulation
