#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// How wgmma finds its operands in shared memory.

namespace binconv::cuda {

// Both operands are rows of 16-byte chunks without swizzle: 8 rows 16 bytes apart are a core
// matrix, the next 8 rows follow, and the second chunk of a row lies `chunk_step` bytes after the
// first. Only the low word depends on the operand.
constexpr uint64_t kRowStepDescriptor = uint64_t{128 >> 4} << 32;

__device__ constexpr uint32_t descriptor_word(uint32_t first_byte, uint32_t chunk_step) {
  return first_byte >> 4 | (chunk_step >> 4) << 16;
}

}  // namespace binconv::cuda
