#pragma once

#include "binconv/conv2d.h"
#include "cuda/numeric.cuh"

// From exact integers to outputs, as conv2d.h defines it: the end of every convolution kernel.

namespace binconv::cuda {

// Of one channel. A sum with -0 leaves every number as it is: it stands for a shift left out.
struct ActivationTerms {
  float in_shift = -0.0f;
  float slope = 0.0f;
  float out_shift = -0.0f;
  bool is_relu = true;
};

struct ChannelTerms {
  float scale = 1.0f;
  float bias = 0.0f;
  ActivationTerms activation;
  float threshold = 0.0f;
  bool below = false;
};

__device__ inline ActivationTerms load_activation_terms(const Activation& activation,
                                                        int64_t channel) {
  ActivationTerms terms;
  if (activation.in_shift) terms.in_shift = activation.in_shift[channel];
  if (activation.slope) terms.slope = activation.slope[channel];
  if (activation.out_shift) terms.out_shift = activation.out_shift[channel];
  terms.is_relu = !activation.slope;
  return terms;
}

__device__ inline ChannelTerms load_channel_terms(const Epilogue& epilogue, int64_t channel) {
  ChannelTerms terms;
  if (epilogue.scale) terms.scale = epilogue.scale[channel];
  if (epilogue.bias) terms.bias = epilogue.bias[channel];
  if (epilogue.activation.enabled) {
    terms.activation = load_activation_terms(epilogue.activation, channel);
  }
  terms.threshold = epilogue.threshold.per_channel ? epilogue.threshold.per_channel[channel]
                                                   : epilogue.threshold.value;
  terms.below = epilogue.threshold_below && epilogue.threshold_below[channel] != 0;
  return terms;
}

__device__ inline float scale_and_bias(int32_t acc, const ChannelTerms& terms) {
  return __fmaf_rn(__int2float_rn(acc), terms.scale, terms.bias);
}

// `index` is the position of the result in the output and in the residual.
__device__ inline float add_residual(const Epilogue& epilogue, int64_t index, float y) {
  if (!epilogue.residual) return y;
  return __fadd_rn(y, load_float(epilogue.residual, epilogue.residual_type, index));
}

// The compiler contracts no __fmul_rn and __fadd_rn into an fma.
__device__ inline float apply_activation(float y, const ActivationTerms& terms) {
  y = __fadd_rn(y, terms.in_shift);
  const float scaled = terms.is_relu ? 0.0f : __fmul_rn(terms.slope, y);
  return __fadd_rn(y < 0.0f ? scaled : y, terms.out_shift);
}

__device__ inline bool passes(float y, float threshold, bool below) {
  return below ? y <= threshold : y >= threshold;
}

// Where results go. Pixels are numbered over the whole batch.
struct Output {
  Epilogue epilogue;
  void* data;
  uint32_t* bits;  // Packed, beside the data or the data itself; null: not asked for.
  int64_t pixels;
  int64_t plane_pixels;  // out_height * out_width
  int64_t channels;
  int64_t packed_words;  // 32-bit words of a packed pixel.
};

__device__ inline int64_t output_index(const Output& output, int64_t pixel, int64_t channel) {
  if (output.epilogue.out_layout == Layout::kNHWC) return pixel * output.channels + channel;
  const int64_t batch = pixel / output.plane_pixels;
  return (batch * (output.channels - 1) + channel) * output.plane_pixels + pixel;
}

// For a warp whose lanes hold the same pixel in 32 consecutive channels, the first a multiple
// of 32. All lanes call, also those of channels beyond the last.
__device__ inline void store_bits(const Output& output, int64_t pixel, int64_t channel, float y,
                                  const ChannelTerms& terms) {
  const bool bit = channel < output.channels && passes(y, terms.threshold, terms.below);
  const uint32_t word = __ballot_sync(kWholeWarp, bit);
  // The warp of the last channels also writes the zeros behind them.
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = channel / kWarpSize;
  const bool is_last = (first + 1) * kWarpSize >= output.channels;
  if (lane < (is_last ? output.packed_words - first : 1)) {
    output.bits[pixel * output.packed_words + first + lane] = lane == 0 ? word : 0;
  }
}

// The same for every output.
__device__ inline void store_result(const Output& output, int64_t pixel, int64_t channel,
                                    const ChannelTerms& terms, int32_t acc) {
  const Epilogue& epilogue = output.epilogue;
  const bool inside = channel < output.channels;
  const int64_t index = output_index(output, pixel, channel);
  if (epilogue.clamp) acc = max(acc, 0);
  if (epilogue.out_type == DataType::kInt32) {
    if (inside) static_cast<int32_t*>(output.data)[index] = acc;
    return;
  }
  float y = scale_and_bias(acc, terms);
  if (inside) y = add_residual(epilogue, index, y);
  if (epilogue.activation.enabled) y = apply_activation(y, terms.activation);
  if (output.bits) store_bits(output, pixel, channel, y, terms);
  if (inside && epilogue.out_type != DataType::kBits) {
    store_float(output.data, epilogue.out_type, index, y);
  }
}

}  // namespace binconv::cuda
