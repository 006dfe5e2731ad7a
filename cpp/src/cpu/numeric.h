#pragma once

#include <bit>
#include <cstdint>

#include "binconv/types.h"

// Element types of host arrays. The conversions are branch-free integer code that compilers
// vectorize, and do no arithmetic on denormals, so that the caller's flush-to-zero mode cannot
// change a result.

namespace binconv::cpu {
namespace {  // Each instruction set compiles its own copy.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(Half x) {
  constexpr uint32_t kRebias = 112u << 23;          // From exponent bias 15 to 127.
  constexpr uint32_t kSmallestNormal = 113u << 23;  // 2^-14
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  const uint32_t normal = magnitude + kRebias;
  const float fraction =
      std::bit_cast<float>(magnitude + kSmallestNormal) - std::bit_cast<float>(kSmallestNormal);
  const uint32_t finite = magnitude < (1u << 23) ? std::bit_cast<uint32_t>(fraction) : normal;
  return std::bit_cast<float>(sign | (magnitude >= (31u << 23) ? magnitude | 0x7f800000u : finite));
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline int8_t from_float<int8_t>(float x) {
  return static_cast<int8_t>(x);
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
template <>
inline Half from_float<Half>(float x) {
  constexpr uint32_t kRebias = 112u << 23;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  // 2^-24, the step of half's denormals, is the step of floats at 0.5: the sum rounds just there.
  const uint32_t denormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < (113u << 23) ? denormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= (143u << 23) ? special : finite;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | half)};
}

// visit(T{}) with the element type that `type` names; int32 and bits are never read.
template <class Visit>
void with_type(DataType type, const Visit& visit) {
  switch (type) {
    case DataType::kInt8:
      return visit(int8_t{});
    case DataType::kFloat32:
      return visit(float{});
    case DataType::kFloat16:
      return visit(Half{});
    case DataType::kBFloat16:
      return visit(BFloat16{});
    default:
      return;
  }
}

}  // namespace
}  // namespace binconv::cpu
