#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace binconv::cuda {

// Division of any 32-bit number by one that is known before the kernel starts.
struct Divisor {
  struct Result {
    uint32_t quotient, remainder;
  };

  explicit Divisor(uint32_t value)
      : value(value),
        reciprocal(static_cast<uint32_t>(std::min<uint64_t>((1ull << 32) / value, 0xffffffff))) {}

  // The product is less than 1 below the quotient.
  __host__ __device__ Result divide(uint32_t dividend) const {
    const uint32_t quotient = static_cast<uint32_t>(uint64_t{dividend} * reciprocal >> 32);
    const uint32_t remainder = dividend - quotient * value;
    if (remainder >= value) return {quotient + 1, remainder - value};
    return {quotient, remainder};
  }

  uint32_t value;
  uint32_t reciprocal;  // 2^32 / value, rounded down.
};

}  // namespace binconv::cuda
