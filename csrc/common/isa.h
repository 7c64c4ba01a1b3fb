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
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,fma,f16c,bmi,popcnt")))
#define GAUGEKIT_BF16 \
  __attribute__((     \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi,popcnt")))
#define GAUGEKIT_BF16_INLINE GAUGEKIT_BF16 __attribute__((always_inline)) inline
#endif

#define GAUGEKIT_NOINLINE __attribute__((noinline))

namespace gaugekit {

// In rising order, each with all of those before it: a kernel that has no form for a level runs that of a
// lower one.
enum class Isa { portable, avx2, avx512, vbmi2, bf16 };

// The widest level this processor has, or the lower one that ATEN_CPU_CAPABILITY (torch's own switch:
// default, avx2, avx512) asks for.
inline Isa isa() {
  static const Isa widest = [] {
#ifdef GAUGEKIT_X86
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    const bool at_most_avx2 = asked && std::strcmp(asked, "avx2") == 0;
    if (asked && std::strcmp(asked, "default") == 0) return Isa::portable;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512 && !at_most_avx2) {
      if (!__builtin_cpu_supports("avx512vbmi2")) return Isa::avx512;
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
