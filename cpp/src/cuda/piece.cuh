#pragma once

#include "cuda/numeric.cuh"

// What a thread takes at once where values and their bits meet: whole vectors of values that make
// whole bytes of bits.

namespace binconv::cuda {

template <class T>
constexpr int kPieceValues = sizeof(T) == 1 ? 16 : 8;
template <class T>
using PieceBits = std::conditional_t<sizeof(T) == 1, uint16_t, uint8_t>;

template <class T>
struct alignas(kPieceValues<T> * sizeof(T)) Piece {
  static constexpr int kWords = kPieceValues<T> * sizeof(T) / sizeof(uint32_t);

  __device__ T& operator[](int i) { return reinterpret_cast<T*>(words)[i]; }
  __device__ const T& operator[](int i) const { return reinterpret_cast<const T*>(words)[i]; }

  uint32_t words[kWords];  // As values, the compiler would move them one by one.
};

template <class T>
__device__ void store_whole(T* to, const Piece<T>& piece) {
#pragma unroll
  for (int i = 0; i < piece.kWords; i += 4) {
    const uint32_t* const words = piece.words + i;
    // A plain assignment may become a store of every word.
    __stwb(reinterpret_cast<uint4*>(to) + i / 4, uint4{words[0], words[1], words[2], words[3]});
  }
}

// The bits of word i of a piece, each as the lowest one of where its value lies.
template <class T>
__device__ uint32_t bits_of_word(uint32_t bits, int i) {
  constexpr int kWordValues = sizeof(uint32_t) / sizeof(T);
  constexpr uint32_t kEach = kWordValues == 1 ? 1 : kWordValues == 2 ? 0x00010001 : 0x01010101;
  constexpr uint32_t kSpread = kWordValues == 1 ? 1 : kWordValues == 2 ? 0x00008001 : 0x00204081;
  return (bits >> i * kWordValues & ((1u << kWordValues) - 1)) * kSpread & kEach;
}

// The pattern of 1.0, and what differs in -1.0.
template <class T>
constexpr uint32_t kOne = 0x3f800000;
template <>
constexpr uint32_t kOne<__half> = 0x3c00;
template <>
constexpr uint32_t kOne<__nv_bfloat16> = 0x3f80;
template <>
constexpr uint32_t kOne<int8_t> = 0x01;
template <class T>
constexpr uint32_t kSign = sizeof(T) == 1 ? 0xfe : 1u << (8 * sizeof(T) - 1);

// The low bits as +1 and -1.
template <class T>
__device__ Piece<T> unpack_piece(uint32_t bits) {
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < piece.kWords; ++i) {
    piece.words[i] = bits_of_word<T>(~0u, 0) * kOne<T> ^ bits_of_word<T>(~bits, i) * kSign<T>;
  }
  return piece;
}

// The values whose bits are 1, and +0 for the others.
template <class T>
__device__ Piece<T> mask_piece(const Piece<T>& values, uint32_t bits) {
  constexpr uint32_t kAll = ~0u >> (32 - 8 * sizeof(T));
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < piece.kWords; ++i) {
    piece.words[i] = values.words[i] & bits_of_word<T>(bits, i) * kAll;
  }
  return piece;
}

}  // namespace binconv::cuda
