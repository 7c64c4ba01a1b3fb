// Which instructions a kernel may use, found once at run time, and one body compiled for each of them. No
// file needs -march flags, so one binary runs everywhere.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/lane.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GAUGEKIT_X86 1
#define GAUGEKIT_AVX2 __attribute__((target("avx2,fma,f16c,bmi,popcnt")))
#define GAUGEKIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,popcnt")))
#define GAUGEKIT_VBMI2 \
  __attribute__((      \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,gfni,avx2,fma,f16c,bmi,popcnt")))
#define GAUGEKIT_BF16                                                                                       \
  __attribute__((                                                                                           \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,gfni,avx2,fma,f16c,bmi," \
             "popcnt")))
#define GAUGEKIT_BF16_INLINE GAUGEKIT_BF16 __attribute__((always_inline)) inline
#endif

#if defined(__aarch64__) && defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define GAUGEKIT_ARM 1
#define GAUGEKIT_BFDOT __attribute__((target("arch=armv8.2-a+bf16")))
#ifdef __linux__
#include <sys/auxv.h>
#endif
#endif

#define GAUGEKIT_NOINLINE __attribute__((noinline))

namespace gaugekit {

// This architecture's levels in rising order, each with all of those before it: a kernel that has no form for
// a level runs that of a lower one. vbmi2 is AVX512-VBMI2 with VBMI, VPCLMULQDQ and GFNI, bf16 is
// AVX512-BF16.
#ifdef GAUGEKIT_ARM
enum class Isa { portable, neon, bfdot };
#else
enum class Isa { portable, avx2, avx512, vbmi2, bf16 };
#endif

// Whether a level has these instructions: none of ARM's has, where a kernel written for them alone runs its
// portable form.
#ifdef GAUGEKIT_ARM
constexpr bool has_avx2(Isa) { return false; }
constexpr bool has_avx512(Isa) { return false; }
constexpr bool has_vbmi2(Isa) { return false; }
#else
constexpr bool has_avx2(Isa level) { return level >= Isa::avx2; }
constexpr bool has_avx512(Isa level) { return level >= Isa::avx512; }
constexpr bool has_vbmi2(Isa level) { return level >= Isa::vbmi2; }
#endif

#ifdef GAUGEKIT_ARM
// Every 64-bit ARM has NEON. Of the rest the kernel tells; the C library's header may be too old to name it.
inline Isa widest_on_arm() {
#ifdef __linux__
  constexpr unsigned long HAS_BF16 = 1ul << 14;  // HWCAP2_BF16
  if (getauxval(AT_HWCAP2) & HAS_BF16) return Isa::bfdot;
#endif
  return Isa::neon;
}
#endif

// The widest level this processor has, or the lower one that ATEN_CPU_CAPABILITY (torch's own switch:
// default, avx2, avx512) asks for.
inline Isa isa() {
  static const Isa widest = [] {
#if defined(GAUGEKIT_X86) || defined(GAUGEKIT_ARM)
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    if (asked && std::strcmp(asked, "default") == 0) return Isa::portable;
#endif
#ifdef GAUGEKIT_ARM
    return widest_on_arm();
#endif
#ifdef GAUGEKIT_X86
    const bool at_most_avx2 = asked && std::strcmp(asked, "avx2") == 0;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512 && !at_most_avx2) {
      // They came together, but a hypervisor may hide some.
      if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vbmi2") ||
          !__builtin_cpu_supports("vpclmulqdq") || !__builtin_cpu_supports("gfni"))
        return Isa::avx512;
      return __builtin_cpu_supports("avx512bf16") ? Isa::bf16 : Isa::vbmi2;
    }
    if (avx2) return Isa::avx2;
#endif
    return Isa::portable;
  }();
  return widest;
}

// GAUGEKIT_EACH_ISA makes name##_portable, name##_avx2 and name##_avx512: templates over `types` with these
// `parameters` (both in parentheses), of which each consists of the statement that comes last, compiled for
// its instruction set. BYTES is the width of that set's registers. GAUGEKIT_FORM(level, name, <types>) is the
// one of them for a level, GAUGEKIT_RUN(name, <types>(arguments)) returns what the one for this processor
// returns.
#define GAUGEKIT_UNWRAPPED(...) __VA_ARGS__
#define GAUGEKIT_COMPILED(target, bytes, types, name, parameters, ...) \
  template <GAUGEKIT_UNWRAPPED types>                                  \
  target GAUGEKIT_NOINLINE void name parameters {                      \
    [[maybe_unused]] constexpr int BYTES = bytes;                      \
    __VA_ARGS__;                                                       \
  }
#ifdef GAUGEKIT_X86
#define GAUGEKIT_EACH_ISA(types, name, parameters, ...)                             \
  GAUGEKIT_COMPILED(, 16, types, name##_portable, parameters, __VA_ARGS__)          \
  GAUGEKIT_COMPILED(GAUGEKIT_AVX2, 32, types, name##_avx2, parameters, __VA_ARGS__) \
  GAUGEKIT_COMPILED(GAUGEKIT_AVX512, 64, types, name##_avx512, parameters, __VA_ARGS__)
#define GAUGEKIT_FORM(level, name, ...)                           \
  ((level) >= ::gaugekit::Isa::avx512 ? name##_avx512 __VA_ARGS__ \
   : (level) >= ::gaugekit::Isa::avx2 ? name##_avx2 __VA_ARGS__   \
                                      : name##_portable __VA_ARGS__)
#define GAUGEKIT_RUN(name, ...)                                                       \
  if (::gaugekit::isa() >= ::gaugekit::Isa::avx512) return name##_avx512 __VA_ARGS__; \
  if (::gaugekit::isa() >= ::gaugekit::Isa::avx2) return name##_avx2 __VA_ARGS__;     \
  return name##_portable __VA_ARGS__
#else
#define GAUGEKIT_EACH_ISA(types, name, parameters, ...) \
  GAUGEKIT_COMPILED(, 16, types, name##_portable, parameters, __VA_ARGS__)
#define GAUGEKIT_FORM(level, name, ...) (name##_portable __VA_ARGS__)
#define GAUGEKIT_RUN(name, ...) return name##_portable __VA_ARGS__
#endif

}  // namespace gaugekit
