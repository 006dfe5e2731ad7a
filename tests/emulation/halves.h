#pragma once

#include <cstdint>

// What the two 16-bit types have in common.

namespace binconv::emulation {

// The pattern of the next larger number. Not for a zero of either sign.
inline uint16_t next_up(uint16_t bits) {
  return static_cast<uint16_t>(bits < 0x8000 ? bits + 1 : bits - 1);
}

inline unsigned pair_mask(bool low, bool high) {
  return (low ? 0x0000ffffu : 0) | (high ? 0xffff0000u : 0);
}

}  // namespace binconv::emulation
