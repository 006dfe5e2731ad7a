#pragma once

#include <cstdint>

// The warpgroup multiplication of bits, which CUTLASS 4.2 has no atom for:
//
//   d[m][n] += popcount over k of (a[m][k] & b[n][k]),  m < 64, n < kColumns, k < 256
//
// for a and b in shared memory. With a warpgroup's thread t = 32 * warp + lane, d[4 * j + 2 * i +
// c] is row 16 * warp + lane / 4 + 8 * i, column 8 * j + 2 * (lane % 4) + c (PTX ISA, "Matrix
// fragments for wgmma.mma_async.m64nNk256").

namespace binconv::cuda {

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// clang-format off
#define BINCONV_D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define BINCONV_D16(i) BINCONV_D4(i), BINCONV_D4(i + 4), BINCONV_D4(i + 8), BINCONV_D4(i + 12)
// clang-format on

// kAccumulate: d counts on from its value, else from 0. A constant, since the compiler serializes
// multiplications whose accumulators it cannot tell to be defined.
template <bool kAccumulate>
__device__ void wgmma_and_popcount(int32_t (&d)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k256.s32.b1.b1.and.popc "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "%16, %17, p;\n"
      "}\n"
      : BINCONV_D16(0)
      : "l"(a), "l"(b), "n"(kAccumulate));
}

template <bool kAccumulate>
__device__ void wgmma_and_popcount(int32_t (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k256.s32.b1.b1.and.popc "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p;\n"
      "}\n"
      : BINCONV_D16(0), BINCONV_D16(16)
      : "l"(a), "l"(b), "n"(kAccumulate));
}

template <bool kAccumulate>
__device__ void wgmma_and_popcount(int32_t (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k256.s32.b1.b1.and.popc "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p;\n"
      "}\n"
      : BINCONV_D16(0), BINCONV_D16(16), BINCONV_D16(32), BINCONV_D16(48)
      : "l"(a), "l"(b), "n"(kAccumulate));
}

#undef BINCONV_D16
#undef BINCONV_D4

}  // namespace binconv::cuda
