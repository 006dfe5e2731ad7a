#include "check.h"

namespace binconv {

Queue Queue::cpu(int threads) {
  require(threads >= 1, "threads: got ", threads, ", expected at least 1");
  Queue queue;
  queue.threads_ = threads;
  return queue;
}

Queue Queue::cuda(CUstream_st* stream, int device) {
  require(device >= 0, "device: got ", device, ", expected a CUDA device ordinal");
  Queue queue;
  queue.is_cuda_ = true;
  queue.device_ = device;
  queue.stream_ = stream;
  return queue;
}

Queue Queue::with_kernel(const char* name) const {
  Queue queue = *this;
  queue.kernel_ = name;
  return queue;
}

}  // namespace binconv
