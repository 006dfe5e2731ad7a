#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "binconv/conv2d.h"

// What the library must compute, written from docs/conventions.md by definition and without regard
// for speed. Nothing here calls the library.

namespace binconv::reference {

// Values of [batch][channels][height][width], +1 or -1.
struct Image {
  ImageShape shape;
  std::vector<int8_t> values;

  explicit Image(const ImageShape& s)
      : shape(s), values(static_cast<size_t>(s.batch * s.channels * s.height * s.width)) {}

  int8_t& at(int64_t n, int64_t c, int64_t h, int64_t w) {
    return values[((n * shape.channels + c) * shape.height + h) * shape.width + w];
  }
  int at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return values[((n * shape.channels + c) * shape.height + h) * shape.width + w];
  }
};

inline int64_t element_count(const ImageShape& s) {
  return s.batch * s.channels * s.height * s.width;
}

// Where an element is in a dense array.
inline int64_t offset(const ImageShape& s, Layout layout, int64_t n, int64_t c, int64_t h,
                      int64_t w) {
  if (layout == Layout::kNHWC) return ((n * s.height + h) * s.width + w) * s.channels + c;
  return ((n * s.channels + c) * s.height + h) * s.width + w;
}

inline int64_t pixel_bytes(int64_t channels) {
  int64_t bytes = 16;
  while (bytes * 8 < channels) bytes += 16;
  return bytes;
}

inline std::vector<uint8_t> pack(const Image& image) {
  const ImageShape& s = image.shape;
  const int64_t stride = pixel_bytes(s.channels);
  std::vector<uint8_t> packed(static_cast<size_t>(s.batch * s.height * s.width * stride), 0);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t h = 0; h < s.height; ++h) {
        for (int64_t w = 0; w < s.width; ++w) {
          if (image.at(n, c, h, w) != 1) continue;
          packed[((n * s.height + h) * s.width + w) * stride + c / 8] |= 1 << (c % 8);
        }
      }
    }
  }
  return packed;
}

// How many kernel positions fit into one padded side of the image.
inline int64_t out_extent(int64_t in, int64_t pads, int64_t kernel, int64_t stride,
                          int64_t dilation) {
  int64_t count = 0;
  while (count * stride + dilation * (kernel - 1) < in + pads) ++count;
  return count;
}

inline ImageShape output_shape(const Conv2dShape& s) {
  return {s.batch, s.weight.out_channels,
          out_extent(s.in_height, s.pad_top + s.pad_bottom, s.weight.kernel_height, s.stride_height,
                     s.dilation_height),
          out_extent(s.in_width, s.pad_left + s.pad_right, s.weight.kernel_width, s.stride_width,
                     s.dilation_width)};
}

// The sum for one output. `weight` is an image with batch = out_channels.
inline int convolve_at(const Conv2dShape& s, const Image& x, const Image& weight, int64_t n,
                       int64_t o, int64_t p, int64_t q) {
  const int64_t group_channels = s.weight.in_channels / s.weight.groups;
  const int64_t group = o / (s.weight.out_channels / s.weight.groups);
  int sum = 0;
  for (int64_t c = 0; c < group_channels; ++c) {
    for (int64_t i = 0; i < s.weight.kernel_height; ++i) {
      for (int64_t j = 0; j < s.weight.kernel_width; ++j) {
        const int64_t h = p * s.stride_height - s.pad_top + i * s.dilation_height;
        const int64_t w = q * s.stride_width - s.pad_left + j * s.dilation_width;
        const bool inside = h >= 0 && h < s.in_height && w >= 0 && w < s.in_width;
        const int value = inside ? x.at(n, group * group_channels + c, h, w) : s.pad_value;
        sum += value * weight.at(o, c, i, j);
      }
    }
  }
  return sum;
}

// A 16-bit floating-point format, by the value of each of its bit patterns.
class Half {
 public:
  static const Half& float16() {
    static const Half format(5, 10);
    return format;
  }
  static const Half& bfloat16() {
    static const Half format(8, 7);
    return format;
  }

  // The nearest number, and of two equally near the one with the even pattern. Infinity takes part
  // as the number that would follow the largest one.
  uint16_t encode(float x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return sign | (infinity_ + 1);
    const double magnitude = std::fabs(static_cast<double>(x));
    const auto above = std::lower_bound(values_.begin(), values_.end(), magnitude);
    if (above == values_.end()) return sign | infinity_;
    int64_t pattern = above - values_.begin();
    if (pattern > 0) {
      const double to_upper = values_[pattern] - magnitude;
      const double to_lower = magnitude - values_[pattern - 1];
      if (to_lower < to_upper || (to_lower == to_upper && pattern % 2 != 0)) --pattern;
    }
    return static_cast<uint16_t>(sign | pattern);
  }

  float decode(uint16_t pattern) const {
    const uint16_t magnitude = pattern & 0x7fff;
    float value = std::numeric_limits<float>::quiet_NaN();
    if (magnitude < infinity_) value = static_cast<float>(values_[magnitude]);
    if (magnitude == infinity_) value = std::numeric_limits<float>::infinity();
    return pattern >= 0x8000 ? -value : value;
  }

 private:
  Half(int exponent_bits, int mantissa_bits) {
    const int one = 1 << mantissa_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    infinity_ = static_cast<uint16_t>(((1 << exponent_bits) - 1) * one);
    for (int pattern = 0; pattern <= infinity_; ++pattern) {
      const int exponent = pattern / one, mantissa = pattern % one;
      values_.push_back(exponent == 0
                            ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                            : std::ldexp(one + mantissa, exponent - bias - mantissa_bits));
    }
  }

  std::vector<double> values_;  // Of the patterns from 0 to infinity.
  uint16_t infinity_;
};

inline int64_t element_bytes(DataType type) {
  if (type == DataType::kInt8) return 1;
  return type == DataType::kFloat16 || type == DataType::kBFloat16 ? 2 : 4;
}

// Writes x, rounded once, as element i of an array.
inline void store(DataType type, void* array, int64_t i, float x) {
  uint8_t* element = static_cast<uint8_t*>(array) + i * element_bytes(type);
  if (type == DataType::kInt8) {
    *element = static_cast<uint8_t>(static_cast<int8_t>(x));
  } else if (type == DataType::kFloat32) {
    std::memcpy(element, &x, sizeof x);
  } else {
    const Half& format = type == DataType::kFloat16 ? Half::float16() : Half::bfloat16();
    const uint16_t pattern = format.encode(x);
    std::memcpy(element, &pattern, sizeof pattern);
  }
}

inline float load(DataType type, const void* array, int64_t i) {
  const uint8_t* element = static_cast<const uint8_t*>(array) + i * element_bytes(type);
  if (type == DataType::kInt8) return static_cast<int8_t>(*element);
  if (type == DataType::kFloat32) {
    float x;
    std::memcpy(&x, element, sizeof x);
    return x;
  }
  uint16_t pattern;
  std::memcpy(&pattern, element, sizeof pattern);
  return (type == DataType::kFloat16 ? Half::float16() : Half::bfloat16()).decode(pattern);
}

inline const char* type_name(DataType type) {
  constexpr const char* kNames[] = {"int8", "int32", "float32", "float16", "bfloat16", "bits"};
  return kNames[static_cast<int>(type)];
}

// Every bit pattern of a type of one or two bytes.
inline std::vector<uint8_t> all_patterns(DataType type) {
  std::vector<uint8_t> elements;
  for (int i = 0; i < (element_bytes(type) == 1 ? 256 : 65536); ++i) {
    elements.push_back(static_cast<uint8_t>(i));
    if (element_bytes(type) > 1) elements.push_back(static_cast<uint8_t>(i >> 8));
  }
  return elements;
}

inline std::vector<uint8_t> encode(DataType type, const std::vector<float>& values) {
  std::vector<uint8_t> array(values.size() * element_bytes(type));
  for (size_t i = 0; i < values.size(); ++i) store(type, array.data(), i, values[i]);
  return array;
}

// Equal to the last bit, the sign of zero included; every NaN equals every other.
inline bool same_element(DataType type, const void* a, const void* b, int64_t i) {
  const int64_t bytes = element_bytes(type);
  const void* left = static_cast<const uint8_t*>(a) + i * bytes;
  const void* right = static_cast<const uint8_t*>(b) + i * bytes;
  if (std::memcmp(left, right, bytes) == 0) return true;
  return type != DataType::kInt32 && std::isnan(load(type, a, i)) && std::isnan(load(type, b, i));
}

// The float result before it is rounded to the output type: a null scale is 1, a null bias 0.
inline float epilogue(int acc, const float* scale, const float* bias, const float* residual) {
  const float y = std::fma(static_cast<float>(acc), scale ? *scale : 1.0f, bias ? *bias : 0.0f);
  return residual ? y + *residual : y;
}

// Sums and products of two floats, rounded once: in double they are exact, or so close that
// rounding them again to float gives the same.
inline float sum(float a, float b) { return static_cast<float>(double{a} + double{b}); }
inline float product(float a, float b) { return static_cast<float>(double{a} * double{b}); }

// PReLU between two shifts; a null shift is left out, a null slope makes it ReLU.
inline float activation(float y, const float* in_shift, const float* slope,
                        const float* out_shift) {
  if (in_shift) y = sum(y, *in_shift);
  if (y < 0) y = slope ? product(*slope, y) : 0.0f;
  if (out_shift) y = sum(y, *out_shift);
  return y;
}

// Whether |x - threshold| <= limit, for the gradient of a clipped straight-through estimator.
inline bool is_inside(float x, float threshold, float limit) {
  return sum(threshold, -limit) <= x && x <= sum(threshold, limit);
}

inline int bit(float y, float threshold, bool below) {
  if (std::isnan(y) || std::isnan(threshold)) return 0;
  if (y == threshold) return 1;
  return (y < threshold) == below ? 1 : 0;
}

}  // namespace binconv::reference
