#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "binconv/binconv.h"

// One suite for CPU and GPU: the queues that the tests of this run use, and memory on their device
// that notices who writes, or on the CPU reads, beyond its ends.

namespace binconv::test {

bool& use_cuda();  // Set once, from the command line.

// Queues of the chosen device without a forced kernel: the CPU with 1 and 3 threads, or one CUDA
// stream. Throws Skip where there is no such device.
const std::vector<Queue>& queues();

// The same queues, each held to each of its available kernels, which take all common shapes.
const std::vector<Queue>& kernel_queues();

// Whether the queue's kernel takes a shape, which is a valid one.
bool takes(const Queue& queue, const Conv2dShape& shape);

// The kernel queues that take the shape; among them is the kernel that the library itself chooses.
std::vector<Queue> kernel_queues(const Conv2dShape& shape);

// A queue like this one on which work runs at the same time: another stream of the same device.
Queue sibling_queue(const Queue& queue);

std::string describe(const Queue& queue);

// Waits for everything that was queued.
void synchronize(const Queue& queue);

// Where in its pages a buffer lies. At the end, the first byte beyond it is on a page that cannot
// be touched, and it is aligned to no more than it must be whenever its size is not. kOffEnd moves
// it away from there by one element, so that its start has the other parity of the alignment.
enum class Placement { kStart, kEnd, kOffEnd };

// `bytes` of memory on the queue's device, filled with kPoison, as is everything around them.
class Buffer {
 public:
  static constexpr uint8_t kPoison = 0xa5;

  Buffer(const Queue& queue, int64_t bytes, int64_t alignment,
         Placement placement = Placement::kEnd);
  // Holds these values, and check_unchanged() knows them.
  template <class T>
  Buffer(const Queue& queue, const std::vector<T>& values, int64_t alignment,
         Placement placement = Placement::kEnd)
      : Buffer(queue, static_cast<int64_t>(values.size() * sizeof(T)), alignment, placement) {
    write(values.data());
  }
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  int64_t bytes() const { return bytes_; }
  void* data() const { return base_ + offset_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }

  void write(const void* values);
  void remember();  // Makes the content, whoever wrote it, what check_unchanged() expects.
  // The content, when all work queued so far is done.
  std::vector<uint8_t> read() const;
  template <class T>
  std::vector<T> read_as() const {
    const std::vector<uint8_t> content = read();
    std::vector<T> values(content.size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), content.data(), values.size() * sizeof(T));
    return values;
  }

  void check_guards(const char* name) const;     // Nothing around the buffer was written.
  void check_unchanged(const char* name) const;  // Nor the buffer, since write() or remember().
  void check_untouched(const char* name) const;  // Nor the buffer, ever.

 private:
  std::vector<uint8_t> read_range(int64_t first, int64_t count) const;

  Queue queue_;
  int64_t bytes_;
  uint8_t* base_;   // The first byte that can be read, guards included,
  int64_t span_;    // and how many there are.
  int64_t offset_;  // Of the buffer in them.
  std::vector<uint8_t> written_;
};

}  // namespace binconv::test
