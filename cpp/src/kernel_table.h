#pragma once

#include <cstdint>
#include <span>

#include "binconv/conv2d.h"

// The kernel table: every convolution kernel of the library is one row.

namespace binconv {

// The CPU instruction sets that some kernel is written for.
struct CpuFeatures {
  bool avx2 = false;  // with FMA
  bool avx512_vpopcntdq = false;
  bool neon = false;
};

// What decides whether a kernel can run: a plain value, so that selection is tested without the
// device.
struct Target {
  bool is_cuda = false;
  int compute_capability = 0;  // CUDA: 10 * major + minor.
  CpuFeatures cpu;
};

struct WeightValues {
  const void* data;
  DataType type;
  Layout layout;  // Of the image that each filter is.
};

struct Conv2dArgs {
  Conv2dShape shape;
  const uint8_t* input;
  const uint8_t* prepared_weight;
  Epilogue epilogue;
  void* output;
  void* workspace;
};

struct Kernel {
  const char* name;
  bool (*runs_on)(const Target&);
  bool (*accepts)(const Conv2dShape&);
  int64_t (*prepared_bytes)(const WeightShape&);
  void (*prepare)(const WeightShape&, const uint8_t* packed, uint8_t* prepared, const Queue&);
  // Null, or the same from values, which also writes each filter's mean magnitude to means unless
  // that is null.
  void (*prepare_values)(const WeightShape&, const WeightValues&, uint8_t* prepared, float* means,
                         const Queue&) = nullptr;
  int64_t (*workspace_bytes)(const Conv2dShape&, const Queue&);
  void (*launch)(const Conv2dArgs&, const Queue&);
  // Null, or for some convolutions of values, whose bits then go through no memory: the input of
  // the arguments is not read.
  bool (*takes_values)(const Conv2dShape&, const Values&) = nullptr;
  void (*launch_values)(const Conv2dArgs&, const Values&, const Queue&) = nullptr;
};

inline bool accepts_any_shape(const Conv2dShape&) { return true; }

// Best kernel first, for each kind of device.
std::span<const Kernel* const> kernel_table();

Target target_of(const Queue& queue);

// The kernel whose weight format a device uses: its best row, or the row named `forced`.
const Kernel& weight_kernel(const Target& target, const char* forced);

// The best row that runs on the target, accepts the shape and reads the device's weight format.
// Weights are prepared before any image size is known, so kernels of one device that are to be
// chosen between by shape share one `prepare`.
const Kernel& select_kernel(const Conv2dShape& shape, const Target& target, const char* forced);

}  // namespace binconv
