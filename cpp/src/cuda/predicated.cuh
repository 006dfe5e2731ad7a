#pragma once

#include <cstring>

#include "cuda/numeric.cuh"

// Stores that are no branches, across which the compiler would not move other work.

namespace binconv::cuda {

// The instruction's operands: %1 is the address, %2 and so on what follows.
#define BINCONV_STORE_IF(condition, to, instruction, ...) \
  asm volatile(                                           \
      "{\n"                                               \
      ".reg .pred p;\n"                                   \
      "setp.ne.b32 p, %0, 0;\n"                           \
      "@p " instruction                                   \
      ";\n"                                               \
      "}\n" ::"r"(static_cast<int>(condition)),           \
      "l"(__cvta_generic_to_global(to)), __VA_ARGS__      \
      : "memory")

template <class T>
__device__ void store_if(bool condition, T* to, T value) {
  std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t> bits;
  static_assert(sizeof(T) == sizeof bits);
  memcpy(&bits, &value, sizeof bits);
  if constexpr (sizeof bits == 2) {
    BINCONV_STORE_IF(condition, to, "st.global.b16 [%1], %2", "h"(bits));
  } else {
    BINCONV_STORE_IF(condition, to, "st.global.b32 [%1], %2", "r"(bits));
  }
}

template <class T>
__device__ void store_if(bool condition, T* to, const Vector<T, kVectorWidth<T>>& vector) {
  uint4 words;
  memcpy(&words, &vector, sizeof words);
  BINCONV_STORE_IF(condition, to, "st.global.v4.b32 [%1], {%2, %3, %4, %5}", "r"(words.x),
                   "r"(words.y), "r"(words.z), "r"(words.w));
}

#undef BINCONV_STORE_IF

}  // namespace binconv::cuda
