#pragma once

#include "cpu/numeric.h"
#include "emulation/halves.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return binconv::cpu::to_float(binconv::cpu::Half{x.bits}); }
inline __half __float2half_rn(float x) {
  return {binconv::cpu::from_float<binconv::cpu::Half>(x).bits};
}
inline __half __float2half_ru(float x) {
  const __half nearest = __float2half_rn(x);
  return __half2float(nearest) < x ? __half{binconv::emulation::next_up(nearest.bits)} : nearest;
}
inline __half2 __half2half2(__half x) { return {x, x}; }
inline unsigned __hge2_mask(__half2 a, __half2 b) {
  return binconv::emulation::pair_mask(__half2float(a.x) >= __half2float(b.x),
                                       __half2float(a.y) >= __half2float(b.y));
}
