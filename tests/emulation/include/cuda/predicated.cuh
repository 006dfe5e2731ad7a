#pragma once

#include "cuda/numeric.cuh"

// In place of the library's predicated.cuh, which is made of PTX.

namespace binconv::cuda {

template <class T>
void store_if(bool condition, T* to, T value) {
  if (condition) *to = value;
}

template <class T>
void store_if(bool condition, T* to, const Vector<T, kVectorWidth<T>>& vector) {
  if (condition) store_vector(to, vector);
}

}  // namespace binconv::cuda
