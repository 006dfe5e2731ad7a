#pragma once

#include <cstdint>

namespace binconv {

// The bits of an image as gradient.h takes them.
struct PixelBits {
  const uint8_t* data;
  int64_t pixel_bytes;
};

}  // namespace binconv
