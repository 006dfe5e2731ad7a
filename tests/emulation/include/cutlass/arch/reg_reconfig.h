#pragma once

#include <cstdint>

#include "emulation/warps.h"

namespace cutlass::arch {

constexpr bool is_register_count(uint32_t count) {
  return count % 8 == 0 && count >= 24 && count <= 256;
}

template <uint32_t kCount>
void warpgroup_reg_alloc() {
  static_assert(is_register_count(kCount));
  binconv::emulation::take_registers(kCount);
}
template <uint32_t kCount>
void warpgroup_reg_dealloc() {
  static_assert(is_register_count(kCount));
  binconv::emulation::give_registers(kCount);
}

}  // namespace cutlass::arch
