#pragma once

#include <cstdint>

#include "emulation/warps.h"

namespace cute {

struct alignas(16) uint128_t {
  uint64_t low, high;
};

struct SM75_U32x4_LDSM_N {
  static void copy(const uint128_t& row, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    uint32_t matrices[4];
    binconv::emulation::load_matrices(&row, matrices);
    a = matrices[0], b = matrices[1], c = matrices[2], d = matrices[3];
  }
};

}  // namespace cute
