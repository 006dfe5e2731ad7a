#pragma once

#include <cstdint>

#include "emulation/gpu.h"

namespace cute {

inline uint32_t elect_one_sync() {
  __syncwarp();  // The lanes must be together.
  return threadIdx.x % 32 == 0;
}

}  // namespace cute
