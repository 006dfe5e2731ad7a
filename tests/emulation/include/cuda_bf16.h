#pragma once

#include "cpu/numeric.h"
#include "emulation/halves.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return binconv::cpu::to_float(binconv::cpu::BFloat16{x.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {binconv::cpu::from_float<binconv::cpu::BFloat16>(x).bits};
}
inline __nv_bfloat16 __float2bfloat16_ru(float x) {
  const __nv_bfloat16 nearest = __float2bfloat16_rn(x);
  const bool is_below = __bfloat162float(nearest) < x;
  return is_below ? __nv_bfloat16{binconv::emulation::next_up(nearest.bits)} : nearest;
}
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline unsigned __hge2_mask(__nv_bfloat162 a, __nv_bfloat162 b) {
  return binconv::emulation::pair_mask(__bfloat162float(a.x) >= __bfloat162float(b.x),
                                       __bfloat162float(a.y) >= __bfloat162float(b.y));
}
