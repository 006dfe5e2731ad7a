#pragma once

#include <cstring>

#include "cuda/numeric.cuh"

// Stores that are no branches, across which the compiler would not move other work.

namespace binconv::cuda {

template <class T>
__device__ void store_if(bool condition, T* to, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    memcpy(&bits, &value, sizeof bits);
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %0, 0;\n"
        "@p st.global.b16 [%1], %2;\n"
        "}\n" ::"r"(static_cast<int>(condition)),
        "l"(__cvta_generic_to_global(to)), "h"(bits)
        : "memory");
  } else {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %0, 0;\n"
        "@p st.global.b32 [%1], %2;\n"
        "}\n" ::"r"(static_cast<int>(condition)),
        "l"(__cvta_generic_to_global(to)), "r"(bits)
        : "memory");
  }
}

template <class T>
__device__ void store_if(bool condition, T* to, const Vector<T, kVectorWidth<T>>& vector) {
  uint4 words;
  memcpy(&words, &vector, sizeof words);
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %0, 0;\n"
      "@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(static_cast<int>(condition)),
      "l"(__cvta_generic_to_global(to)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
      : "memory");
}

}  // namespace binconv::cuda
