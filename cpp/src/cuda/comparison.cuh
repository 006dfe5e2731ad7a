#pragma once

#include "cuda/numeric.cuh"
#include "cuda/piece.cuh"

// How values become bits.

namespace binconv::cuda {

// The bits x >= threshold. Types of fewer than 32 bits compare as they are, several at once: for
// them it is x >= the threshold rounded up.
template <class T>
struct Comparison {
  __device__ explicit Comparison(float threshold) : threshold(threshold) {}

  __device__ uint32_t operator()(const Piece<T>& piece) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kPieceValues<T>; ++i) {
      if (piece[i] >= threshold) bits |= 1u << i;
    }
    return bits;
  }

  float threshold;
};

// Of a type with a vector of two, whose instructions compare pairs.
template <class T, class Pair>
struct PairComparison {
  __device__ explicit PairComparison(Pair threshold) : threshold(threshold) {}

  __device__ uint32_t operator()(const Piece<T>& piece) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < piece.kWords; ++i) {
      const Pair& pair = reinterpret_cast<const Pair&>(piece.words[i]);
      bits |= __hge2_mask(pair, threshold) & 0x20001u << 2 * i;
    }
    return bits | bits >> 16;
  }

  Pair threshold;
};

template <>
struct Comparison<__half> : PairComparison<__half, __half2> {
  __device__ explicit Comparison(float threshold)
      : PairComparison(__half2half2(__float2half_ru(threshold))) {}
};

template <>
struct Comparison<__nv_bfloat16> : PairComparison<__nv_bfloat16, __nv_bfloat162> {
  __device__ explicit Comparison(float threshold)
      : PairComparison(__bfloat162bfloat162(__float2bfloat16_ru(threshold))) {}
};

// Byte by byte: x < t where (x + 128) - (t + 128) borrows, which the high bits decide with the
// borrow from those below. The high bit of x + 128 is that of ~x.
template <>
struct Comparison<int8_t> {
  static constexpr uint32_t kEach = 0x01010101, kLow = 0x7f * kEach;
  static constexpr uint32_t kGather = 1 | 1 << 7 | 1 << 14 | 1 << 21;  // High bits to the top.

  __device__ explicit Comparison(float threshold)
      : limit((128 + static_cast<int32_t>(ceilf(fminf(fmaxf(threshold, -128.0f), 127.0f)))) *
              kEach),
        low_limit((limit & kLow) + kLow),
        results(threshold <= 127.0f ? 0x80 * kEach : 0) {}

  __device__ uint32_t operator()(const Piece<int8_t>& piece) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = piece.kWords - 1; i >= 0; --i) {
      const uint32_t x = piece.words[i], low_borrow = low_limit - (x & kLow);
      const uint32_t borrow = (x & limit) | ((x | limit) & low_borrow);
      bits = bits << 4 | (~borrow & results) * kGather >> 28;
    }
    return bits;
  }

  uint32_t limit, low_limit, results;
};

// The thresholds of a piece whose value `first` has channel `channel`.
template <int kValues>
__device__ void load_thresholds(const float* thresholds, uint32_t channels, int32_t first,
                                uint32_t channel, float (&of_values)[kValues]) {
  const bool are_neighbours = first <= 0 && channels % kValues == 0 && channel % kValues == 0;
  if (are_neighbours && is_vector_aligned(thresholds)) {
#pragma unroll
    for (int i = 0; i < kValues; i += 4) {
      const auto four = load_vector<4>(thresholds + channel + i);
      for (int j = 0; j < 4; ++j) of_values[i + j] = four.values[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    of_values[i] = thresholds[channel];
    if (i >= first && ++channel == channels) channel = 0;
  }
}

template <class T>
__device__ uint32_t compare_each(const Piece<T>& piece,
                                 const float (&thresholds)[kPieceValues<T>]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kPieceValues<T>; ++i) {
    if (to_float(piece[i]) >= thresholds[i]) bits |= 1u << i;
  }
  return bits;
}

}  // namespace binconv::cuda
