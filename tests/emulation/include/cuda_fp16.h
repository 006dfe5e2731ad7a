#pragma once

#include "cpu/numeric.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return binconv::cpu::to_float(binconv::cpu::Half{x.bits}); }
inline __half __float2half_rn(float x) {
  return {binconv::cpu::from_float<binconv::cpu::Half>(x).bits};
}
