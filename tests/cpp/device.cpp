#include "device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "test.h"

#if defined(BINCONV_TEST_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace binconv::test {
namespace {

#if defined(BINCONV_TEST_CUDA)

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

Queue new_cuda_queue(int device) {
  cudaStream_t stream;
  check_cuda(cudaSetDevice(device));
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return Queue::cuda(stream, device);
}

uint8_t* cuda_allocate(int64_t bytes) {
  void* memory;
  check_cuda(cudaMalloc(&memory, bytes));
  return static_cast<uint8_t*>(memory);
}

void cuda_free(void* memory) { check_cuda(cudaFree(memory)); }

void cuda_copy(void* to, const void* from, int64_t bytes, const Queue& queue) {
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, queue.stream()));
  check_cuda(cudaStreamSynchronize(queue.stream()));
}

void cuda_fill(void* to, uint8_t value, int64_t bytes, const Queue& queue) {
  check_cuda(cudaMemsetAsync(to, value, bytes, queue.stream()));
}

void cuda_synchronize(const Queue& queue) { check_cuda(cudaStreamSynchronize(queue.stream())); }

#else

[[noreturn]] void fail_without_cuda() {
  throw std::logic_error("these tests were built without CUDA");
}
#if defined(BINCONV_TEST_EMULATION)
Queue new_cuda_queue(int device) { return Queue::cuda(nullptr, device); }
#else
Queue new_cuda_queue(int) { fail_without_cuda(); }
#endif
uint8_t* cuda_allocate(int64_t) { fail_without_cuda(); }
void cuda_free(void*) {}
void cuda_copy(void*, const void*, int64_t, const Queue&) { fail_without_cuda(); }
void cuda_fill(void*, uint8_t, int64_t, const Queue&) { fail_without_cuda(); }
void cuda_synchronize(const Queue&) { fail_without_cuda(); }

#endif

// An emulated GPU works in the host's memory, and has worked when a call returns.
bool has_own_memory([[maybe_unused]] const Queue& queue) {
#if defined(BINCONV_TEST_EMULATION)
  return false;
#else
  return queue.is_cuda();
#endif
}

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

std::vector<Queue> make_queues() {
  if (!use_cuda()) return {Queue::cpu(1), Queue::cpu(3)};
  if (*cuda_architectures() == '\0') throw Skip{"built without CUDA"};
  if (cuda_devices().empty()) throw Skip{"no CUDA device"};
  return {new_cuda_queue(0)};
}

}  // namespace

bool& use_cuda() {
  static bool value = false;
  return value;
}

const std::vector<Queue>& queues() {
  static const std::vector<Queue> all = make_queues();
  return all;
}

const std::vector<Queue>& kernel_queues() {
  static const std::vector<std::string> names = available_kernels(queues()[0]);
  static const std::vector<Queue> all = [] {
    std::vector<Queue> forced;
    for (const std::string& name : names) {
      for (const Queue& queue : queues()) forced.push_back(queue.with_kernel(name.c_str()));
    }
    return forced;
  }();
  return all;
}

bool takes(const Queue& queue, const Conv2dShape& shape) {
  try {
    kernel_name(shape, queue);
  } catch (const Error& error) {
    if (error.status() != Status::kNotSupported) throw;
    return false;
  }
  return true;
}

std::vector<Queue> kernel_queues(const Conv2dShape& shape) {
  const std::string chosen = kernel_name(shape, queues()[0]);
  std::vector<Queue> taking;
  bool has_chosen = false;
  for (const Queue& queue : kernel_queues()) {
    if (!takes(queue, shape)) continue;
    taking.push_back(queue);
    has_chosen |= queue.kernel() == chosen;
  }
  if (!has_chosen) throw std::logic_error(chosen + " is chosen for a shape that it does not take");
  return taking;
}

Queue sibling_queue(const Queue& queue) {
  return queue.is_cuda() ? new_cuda_queue(queue.device()).with_kernel(queue.kernel()) : queue;
}

std::string describe(const Queue& queue) {
  const std::string device = queue.is_cuda()
                                 ? "cuda:" + std::to_string(queue.device())
                                 : "cpu with threads = " + std::to_string(queue.threads());
  return device + ", kernel " + (queue.kernel() ? queue.kernel() : "not forced");
}

void synchronize(const Queue& queue) {
  if (has_own_memory(queue)) cuda_synchronize(queue);
}

// On a GPU the pages around the buffer can be read, and are checked instead.
Buffer::Buffer(const Queue& queue, int64_t bytes, int64_t alignment, Placement placement)
    : queue_(queue), bytes_(bytes) {
  const int64_t page = page_bytes();
  const int64_t body = std::max<int64_t>((bytes + alignment + page - 1) / page, 1) * page;
  const int64_t last = (body - bytes) / alignment * alignment;
  switch (placement) {
    case Placement::kStart:
      offset_ = 0;
      break;
    case Placement::kEnd:
      offset_ = last;
      break;
    case Placement::kOffEnd:
      offset_ = last - alignment;
      break;
  }
  if (has_own_memory(queue_)) {
    span_ = body + 2 * page;
    offset_ += page;
    base_ = cuda_allocate(span_);
    cuda_fill(base_, kPoison, span_, queue_);
    return;
  }
  void* memory =
      mmap(nullptr, body + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  span_ = body;
  base_ = static_cast<uint8_t*>(memory) + page;
  std::memset(base_, kPoison, span_);
  if (mprotect(base_ - page, page, PROT_NONE) != 0 ||
      mprotect(base_ + span_, page, PROT_NONE) != 0) {
    throw std::runtime_error("mprotect failed");
  }
}

Buffer::~Buffer() {
  if (has_own_memory(queue_)) {
    cuda_free(base_);
  } else {
    munmap(base_ - page_bytes(), span_ + 2 * page_bytes());
  }
}

void Buffer::write(const void* values) {
  const uint8_t* bytes = static_cast<const uint8_t*>(values);
  written_.assign(bytes, bytes + bytes_);
  if (bytes_ == 0) return;
  if (has_own_memory(queue_)) {
    cuda_copy(data(), values, bytes_, queue_);
  } else {
    std::memcpy(data(), values, bytes_);
  }
}

void Buffer::remember() { written_ = read(); }

std::vector<uint8_t> Buffer::read() const { return read_range(offset_, bytes_); }

std::vector<uint8_t> Buffer::read_range(int64_t first, int64_t count) const {
  if (!has_own_memory(queue_)) return {base_ + first, base_ + first + count};
  std::vector<uint8_t> range(count);
  if (count > 0) cuda_copy(range.data(), base_ + first, count, queue_);
  return range;
}

void Buffer::check_guards(const char* name) const {
  const std::vector<uint8_t> before = read_range(0, offset_);
  const int64_t end = offset_ + bytes_;
  const std::vector<uint8_t> after = read_range(end, span_ - end);
  const Context context(std::string("the guard bytes around ") + name);
  CHECK_EQ(before, std::vector<uint8_t>(before.size(), kPoison));
  CHECK_EQ(after, std::vector<uint8_t>(after.size(), kPoison));
}

void Buffer::check_unchanged(const char* name) const {
  check_guards(name);
  if (!has_own_memory(queue_) && std::equal(written_.begin(), written_.end(), as<uint8_t>()))
    return;
  const Context context(std::string(name) + ", which must not change");
  CHECK_EQ(read(), written_);
}

void Buffer::check_untouched(const char* name) const {
  check_guards(name);
  const Context context(std::string(name) + ", which must not be touched");
  CHECK_EQ(read(), std::vector<uint8_t>(bytes_, kPoison));
}

}  // namespace binconv::test
