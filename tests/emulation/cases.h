#pragma once

#include <cstdint>

namespace binconv::emulation {

// A random convolution on one kernel of the emulated GPU, compared with the reference. The shape,
// the values, the epilogue, the memory, the size of the GPU, the plan and the order of the threads
// are all drawn from the seed.
void check_random_conv2d(const char* kernel, uint64_t seed);

// The same for a 1x1 convolution of floating-point values in NHWC.
void check_random_pointwise(const char* kernel, uint64_t seed);

// The same for pack_bits, pack_bits_and_clip and unpack_bits of a random image.
void check_random_bits(uint64_t seed);

}  // namespace binconv::emulation
