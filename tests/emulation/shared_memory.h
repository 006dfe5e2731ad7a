#pragma once

#include <cstdint>

// Dynamic shared memory of the block. Checks that nothing lies or is written beyond what the launch
// asked for; at a block's start it holds random bytes, since a kernel may not expect zeros.

namespace binconv::emulation {

constexpr int kMaxSharedBytes = 227 * 1024;

void reset_shared_memory(int64_t bytes);
void check_shared_memory();  // Nothing was written beyond its end.

// The offset of `bytes` bytes that `what` touches.
int64_t shared_offset(const void* pointer, int64_t bytes, int64_t alignment, const char* what);

// In the shared window: dynamic shared memory does not start at 0.
uint32_t shared_address(const void* pointer);
const uint8_t* at_shared_address(uint32_t address, int64_t bytes, const char* what);

}  // namespace binconv::emulation
