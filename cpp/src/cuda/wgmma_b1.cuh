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
#define BINCONV_D8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), \
                      "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define BINCONV_D24(i) BINCONV_D8(i), BINCONV_D8(i + 8), BINCONV_D8(i + 16)
// clang-format on

// kAccumulate: d counts on from its value, else from 0. A constant, since the compiler serializes
// multiplications whose accumulators it cannot tell to be defined.
template <bool kAccumulate>
__device__ void wgmma_and_popcount(int32_t (&d)[24], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %26, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n48k256.s32.b1.b1.and.popc "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23}, "
      "%24, %25, p;\n"
      "}\n"
      : BINCONV_D24(0)
      : "l"(a), "l"(b), "n"(kAccumulate));
}

template <bool kAccumulate>
__device__ void wgmma_and_popcount(int32_t (&d)[40], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %42, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n80k256.s32.b1.b1.and.popc "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39}, "
      "%40, %41, p;\n"
      "}\n"
      : BINCONV_D24(0), BINCONV_D8(24), BINCONV_D8(32)
      : "l"(a), "l"(b), "n"(kAccumulate));
}

template <bool kAccumulate>
__device__ void wgmma_and_popcount(int32_t (&d)[72], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %74, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n144k256.s32.b1.b1.and.popc "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71}, "
      "%72, %73, p;\n"
      "}\n"
      : BINCONV_D24(0), BINCONV_D24(24), BINCONV_D24(48)
      : "l"(a), "l"(b), "n"(kAccumulate));
}

#undef BINCONV_D24
#undef BINCONV_D8

}  // namespace binconv::cuda
