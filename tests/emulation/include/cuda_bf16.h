#pragma once

#include "cpu/numeric.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return binconv::cpu::to_float(binconv::cpu::BFloat16{x.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {binconv::cpu::from_float<binconv::cpu::BFloat16>(x).bits};
}
