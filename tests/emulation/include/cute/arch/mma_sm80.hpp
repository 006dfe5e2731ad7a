#pragma once

#include <cstdint>

#include "emulation/warps.h"

namespace cute {

struct SM80_16x8x256_S32U1U1S32_TN_ANDPOPC {
  static void fma(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t a0, uint32_t a1,
                  uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1,
                  uint32_t c2, uint32_t c3) {
    uint32_t d[4];
    binconv::emulation::multiply_16x8x256(d, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3});
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
  }
};

}  // namespace cute
