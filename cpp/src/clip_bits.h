#pragma once

#include <cstdint>

namespace binconv {

// The second result of pack_bits_and_clip: where `inside` is null, there is none.
struct ClipBits {
  float limit = 0.0f;
  uint8_t* inside = nullptr;
};

}  // namespace binconv
