#include "cpu/cpu.h"

namespace binconv::cpu {

CpuFeatures features() {
  CpuFeatures found;
#if defined(__x86_64__)
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  found.avx512_vpopcntdq =
      found.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vpopcntdq");
#elif defined(__aarch64__)
  found.neon = true;  // Part of the base architecture.
#endif
  return found;
}

}  // namespace binconv::cpu
