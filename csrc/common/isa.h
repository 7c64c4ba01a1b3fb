// Which instructions a kernel may use, found once at run time. Kernels are compiled three times from one
// template: for the baseline of the architecture, for AVX2 and for AVX-512; no file needs -march flags, so
// one binary runs everywhere.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define GAUGEKIT_X86 1
#define GAUGEKIT_AVX2 __attribute__((target("avx2,fma,f16c")))
#define GAUGEKIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#endif

#define GAUGEKIT_INLINE inline __attribute__((always_inline))
#define GAUGEKIT_NOINLINE __attribute__((noinline))

namespace gaugekit {

enum class Isa { portable, avx2, avx512 };

// The widest level this processor has, or the lower one that ATEN_CPU_CAPABILITY (torch's own switch:
// default, avx2, avx512) asks for.
inline Isa isa() {
  static const Isa level = [] {
#ifdef GAUGEKIT_X86
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    const bool at_most_avx2 = asked && std::strcmp(asked, "avx2") == 0;
    if (asked && std::strcmp(asked, "default") == 0) return Isa::portable;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512 && !at_most_avx2) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::portable;
  }();
  return level;
}

}  // namespace gaugekit
