#pragma once

#include <cstring>

#include "cuda/numeric.cuh"

namespace binconv::cuda {

// A store of 16 bytes that is no branch, across which the compiler would not move other work.
template <class T>
__device__ void store_vector_if(bool condition, T* to, const Vector<T, kVectorWidth<T>>& vector) {
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
