#pragma once

#include <cstdint>

#include "binconv/bits.h"
#include "binconv/export.h"
#include "binconv/types.h"

// Binary 2-D convolution (cross-correlation, as every deep-learning framework computes it):
//
//   acc[n][o][p][q] = sum over c, i, j of  x[n][g * in_channels / groups + c][h][w] *
//   weight[o][c][i][j]
//     with h = p * stride_height - pad_top  + i * dilation_height,
//          w = q * stride_width  - pad_left + j * dilation_width,
//          g = o / (out_channels / groups),
//
// where x and weight are +1 or -1 and x counts as pad_value outside the image. acc is exact,
// always.
//
// A network runs as: prepare_weight once per layer, then binary_conv2d per image batch.

namespace binconv {

// Sizes of a weight tensor.
struct WeightShape {
  int64_t out_channels = 0;
  int64_t in_channels = 0;  // Of the image: all groups together.
  int64_t kernel_height = 0;
  int64_t kernel_width = 0;
  // Divides both channel counts; in_channels / groups is a multiple of 8 unless groups is 1.
  int64_t groups = 1;
};

// All sizes of a convolution. The four pads may differ, so that every framework's "same" padding
// fits.
struct Conv2dShape {
  int64_t batch = 0;
  int64_t in_height = 0;
  int64_t in_width = 0;
  WeightShape weight;
  int64_t stride_height = 1;
  int64_t stride_width = 1;
  int64_t pad_top = 0;
  int64_t pad_left = 0;
  int64_t pad_bottom = 0;
  int64_t pad_right = 0;
  int64_t dilation_height = 1;
  int64_t dilation_width = 1;
  int pad_value = 0;  // What the pixels outside the image count as: 0, +1 or -1.

  // (in + pads - dilation * (kernel - 1) - 1) / stride + 1, rounded down; 0 where the kernel does
  // not fit into the padded image, or a size is out of range.
  BINCONV_API int64_t out_height() const;
  BINCONV_API int64_t out_width() const;
};

// y -> PReLU(y + in_shift[o]) + out_shift[o], where PReLU(v) is v, or slope[o] * v for v < 0:
// RPReLU of ReActNet (Liu et al., 2020), and with null pointers PReLU and ReLU. A null shift is a
// step that is left out: that differs from adding 0 in the sign of a -0 alone.
struct Activation {
  bool enabled = false;              // If not, every pointer is null.
  const float* in_shift = nullptr;   // [out_channels]
  const float* slope = nullptr;      // [out_channels]; null is ReLU: 0 for v < 0.
  const float* out_shift = nullptr;  // [out_channels]
};

// What becomes of acc. With `clamp` it is max(acc, 0) from here on. For kInt32 the output is acc
// itself, and nothing but `clamp` may be set. Otherwise
//
//   y = activation(fma(float(acc), scale[o], bias[o]) + residual[n][o][p][q])
//
// in float32, where every sum and product but the fma is rounded by itself. The output is y rounded
// once (to nearest, ties to even) to out_type, or for kBits the packed bits of y. A null scale
// counts as 1, a null bias as 0; a null residual is left out. A NaN stays a NaN.
//
// A bit is y >= threshold, or where threshold_below[o] is not zero y <= threshold, so that a batch
// normalization of either sign folds into it. It is taken from y before any rounding to out_type,
// and NaN gives 0 either way. The thresholds are for kBits and for `bits`.
struct Epilogue {
  DataType out_type = DataType::kFloat32;  // kInt32, kFloat32, kFloat16, kBFloat16 or kBits.
  Layout out_layout = Layout::kNHWC;       // Of the output (kNHWC for kBits) and of the residual.
  bool clamp = false;
  const float* scale = nullptr;                 // [out_channels]
  const float* bias = nullptr;                  // [out_channels]
  const void* residual = nullptr;               // Sizes of the output; may not overlap it.
  DataType residual_type = DataType::kFloat32;  // kFloat32, kFloat16 or kBFloat16.
  Activation activation;
  Threshold threshold;
  const uint8_t* threshold_below = nullptr;  // [out_channels]
  // Beside a floating-point output, in either layout: where to write the bits of y too. A packed
  // image of out_channels, 16-byte aligned.
  void* bits = nullptr;
};

// Prepared weights: the layout that the kernels of one GPU or CPU read, with what their epilogues
// need. Opaque; they depend on the weights, on WeightShape and on the queue's device (for the CPU:
// on its instruction set), never on image size, stride, padding or dilation. Keep packed weights in
// files.
BINCONV_API int64_t prepared_weight_bytes(const WeightShape& shape, const Queue& queue);

// packed: [out_channels][kernel_height][kernel_width][packed_bytes(in_channels / groups)], as
// written by pack_bits. prepared: prepared_weight_bytes(shape, queue) bytes. Both 16-byte aligned.
BINCONV_API void prepare_weight(const WeightShape& shape, const void* packed, void* prepared,
                                const Queue& queue);

// Scratch memory for one call of prepare_weight on values.
BINCONV_API int64_t weight_workspace_bytes(const WeightShape& shape, const Queue& queue);

// Prepares a weight of values instead: pack_bits and the function above in one, on a GPU in one
// launch. weight: OIHW for kNCHW, OHWI for kNHWC. type: kFloat32, kFloat16, kBFloat16 or kInt8.
// means: [out_channels], takes mean(|weight|) of each filter, as abs_mean computes it, or is null,
// as it must be for kInt8. workspace: weight_workspace_bytes, 16-byte aligned, or null for none.
BINCONV_API void prepare_weight(const WeightShape& shape, const void* weight, DataType type,
                                Layout layout, void* prepared, float* means, void* workspace,
                                const Queue& queue);

// Scratch memory for one call of binary_conv2d. Its content does not outlive the call; calls that
// run one after another may share it.
BINCONV_API int64_t workspace_bytes(const Conv2dShape& shape, const Queue& queue);

// input: packed image of in_channels; output: out_type elements [batch][out_height][out_width]
// [out_channels], or [batch][out_channels][out_height][out_width] for kNCHW, or a packed image of
// out_channels. input, prepared_weight, workspace and a packed output are 16-byte aligned;
// workspace may be null if workspace_bytes is 0. Nothing may overlap the output.
//
// Errors: kInvalidArgument for a batch or a pad below 0, another size below 1, any size but the
// batch above 2^31 - 1 (those of the output, too), groups other than WeightShape says, arrays of
// 2^63 bytes and more, an empty output, kernel_height * kernel_width * in_channels / groups above
// 2^30 - 1 (the reach of an int32 result), null or misaligned pointers, wrong types, a wrong
// pad_value, a CUDA device that does not exist and a kernel name that no row has; kNotSupported for
// a GPU below sm_75, for CUDA in a CPU-only build, and for a kernel that cannot run on the device.
BINCONV_API void binary_conv2d(const Conv2dShape& shape, const void* input,
                               const void* prepared_weight, const Epilogue& epilogue, void* output,
                               void* workspace, const Queue& queue);

// The input of binary_conv2d as values, of which it takes the bits that pack_bits would make.
struct Values {
  const void* data = nullptr;          // Of in_channels; aligned to the element size.
  DataType type = DataType::kFloat32;  // kFloat32, kFloat16, kBFloat16 or kInt8.
  Layout layout = Layout::kNHWC;
  Threshold threshold;  // per_channel: [in_channels]
};

// Scratch memory for one call of binary_conv2d on values.
BINCONV_API int64_t values_workspace_bytes(const Conv2dShape& shape, const Queue& queue);

// The same for values: x is packed to the workspace or, where that is faster, as it is loaded.
// workspace: values_workspace_bytes, 16-byte aligned.
BINCONV_API void binary_conv2d(const Conv2dShape& shape, const Values& x,
                               const void* prepared_weight, const Epilogue& epilogue, void* output,
                               void* workspace, const Queue& queue);

// The kernel that binary_conv2d runs for packed input of this shape on this queue, such as
// "cpu_avx2". For values, some 1x1 convolutions on a GPU run another.
BINCONV_API const char* kernel_name(const Conv2dShape& shape, const Queue& queue);

}  // namespace binconv
