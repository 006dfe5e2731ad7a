#pragma once

#include <cstdint>

#include "binconv/export.h"

struct CUstream_st;  // cudaStream_t is a pointer to this; no CUDA header is needed to name it.

namespace binconv {

// Element types. kBits is the packed form described in bits.h, for outputs of binary_conv2d only.
enum class DataType { kInt8, kInt32, kFloat32, kFloat16, kBFloat16, kBits };

// Memory order of a dense 4-D array (no gaps, no strides). kBits data is always kNHWC.
enum class Layout { kNCHW, kNHWC };

// Sizes of a 4-D array of images, whatever its layout.
struct ImageShape {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
};

// Where a call runs: on a CUDA stream, or on the CPU. A small value; copy it freely.
//
// On a CUDA stream every pointer argument is device memory (or managed, or pinned and mapped), the
// work is queued and the call returns at once, like a kernel launch: nothing synchronizes, nothing
// allocates, and the calls can be captured into a CUDA graph. The caller keeps all memory alive
// until the stream has passed it. The thread's current device is restored before the call returns.
//
// On the CPU every pointer argument is host memory and the work is done when the call returns. Up
// to `threads` threads take part, the calling one among them; small work is left to fewer. The
// others are OpenMP's where the build has it, so that they are shared with a framework that uses it
// too; without it, and in the child of a fork, they live for the call only. Results do not depend
// on the number of threads, unless only some of these flush denormals, as after
// torch.set_flush_denormal: on those, values below float's least normal may count as zero.
//
// Any number of threads may call the library at the same time, as long as their outputs and
// workspaces do not overlap.
class BINCONV_API Queue {
 public:
  // threads >= 1.
  static Queue cpu(int threads = 1);
  // `stream` belongs to `device` (a CUDA ordinal); nullptr is that device's default stream.
  static Queue cuda(CUstream_st* stream, int device);

  // The same queue, held to one row of the kernel table (see kernels.h) instead of the best one
  // that can run. `name` outlives the queue; nullptr lifts the restriction. Weights prepared with
  // one restriction are only valid for calls with the same one.
  Queue with_kernel(const char* name) const;

  bool is_cuda() const { return is_cuda_; }
  int threads() const { return threads_; }         // CPU queues only.
  int device() const { return device_; }           // CUDA queues only.
  CUstream_st* stream() const { return stream_; }  // CUDA queues only.
  const char* kernel() const { return kernel_; }   // nullptr: the library chooses.

 private:
  bool is_cuda_ = false;
  int threads_ = 1;
  int device_ = 0;
  CUstream_st* stream_ = nullptr;
  const char* kernel_ = nullptr;
};

}  // namespace binconv
