// Elements to symbols and raw byte planes, and back (docs/format.md, "Elements"). Plain loops the compiler
// vectorises.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "rans_format.h"

namespace gaugekit::rans {

constexpr int kMaxPlanes = 3;

// y = exponent, sign, mantissa from the most significant bit down (model 0), or the element itself (model 1).
// The symbol is y's top byte, plane p its byte p.
template <class T, int model>
constexpr T permuted(T x) {
  if constexpr (model == kHighByte) return x;
  constexpr int bits = 8 * sizeof(T);
  constexpr T sign = T(1) << (bits - 1), mantissa = T(sign >> 8) - 1;
  return T(T(x << 1) & ~T((sign >> 7) - 1)) | T((x & sign) >> 8) | T(x & mantissa);
}

template <class T, int model>
constexpr T restored(T y) {
  if constexpr (model == kHighByte) return y;
  constexpr int bits = 8 * sizeof(T);
  constexpr T sign = T(1) << (bits - 1), mantissa = T(sign >> 8) - 1;
  return T(T(y << 8) & sign) | T(T(y >> 1) & T(~sign & ~mantissa)) | T(y & mantissa);
}

template <class T, int model>
GAUGEKIT_INLINE void split(const uint8_t* __restrict in, uint64_t n, uint8_t* __restrict symbols,
                           uint8_t* const* planes) {
  uint8_t* __restrict p0 = planes[0];
  uint8_t* __restrict p1 = sizeof(T) > 2 ? planes[1] : nullptr;
  uint8_t* __restrict p2 = sizeof(T) > 2 ? planes[2] : nullptr;
  for (uint64_t i = 0; i < n; ++i) {
    const T y = permuted<T, model>(load<T>(in + i * sizeof(T)));
    symbols[i] = uint8_t(y >> (8 * sizeof(T) - 8));
    p0[i] = uint8_t(y);
    if constexpr (sizeof(T) > 2) {
      p1[i] = uint8_t(y >> 8);
      p2[i] = uint8_t(y >> 16);
    }
  }
}

template <class T, int model>
GAUGEKIT_INLINE void merge(const uint8_t* __restrict symbols, const uint8_t* const* planes, uint64_t n,
                           uint8_t* __restrict out) {
  const uint8_t* __restrict p0 = planes[0];
  const uint8_t* __restrict p1 = sizeof(T) > 2 ? planes[1] : nullptr;
  const uint8_t* __restrict p2 = sizeof(T) > 2 ? planes[2] : nullptr;
  for (uint64_t i = 0; i < n; ++i) {
    T y = T(T(symbols[i]) << (8 * sizeof(T) - 8)) | p0[i];
    if constexpr (sizeof(T) > 2) y |= T(p1[i]) << 8 | T(p2[i]) << 16;
    store<T>(out + i * sizeof(T), restored<T, model>(y));
  }
}

using SplitFunction = void (*)(const uint8_t*, uint64_t, uint8_t*, uint8_t* const*);
using MergeFunction = void (*)(const uint8_t*, const uint8_t* const*, uint64_t, uint8_t*);

// One loop, compiled for each instruction set.
template <class T, int model>
struct Planes {
  static void split_portable(const uint8_t* in, uint64_t n, uint8_t* symbols, uint8_t* const* planes) {
    split<T, model>(in, n, symbols, planes);
  }
  static void merge_portable(const uint8_t* symbols, const uint8_t* const* planes, uint64_t n, uint8_t* out) {
    merge<T, model>(symbols, planes, n, out);
  }
#ifdef GAUGEKIT_X86
  GAUGEKIT_AVX2 static void split_avx2(const uint8_t* in, uint64_t n, uint8_t* symbols,
                                       uint8_t* const* planes) {
    split<T, model>(in, n, symbols, planes);
  }
  GAUGEKIT_AVX2 static void merge_avx2(const uint8_t* symbols, const uint8_t* const* planes, uint64_t n,
                                       uint8_t* out) {
    merge<T, model>(symbols, planes, n, out);
  }
  GAUGEKIT_AVX512 static void split_avx512(const uint8_t* in, uint64_t n, uint8_t* symbols,
                                           uint8_t* const* planes) {
    split<T, model>(in, n, symbols, planes);
  }
  GAUGEKIT_AVX512 static void merge_avx512(const uint8_t* symbols, const uint8_t* const* planes, uint64_t n,
                                           uint8_t* out) {
    merge<T, model>(symbols, planes, n, out);
  }
#endif
  static SplitFunction split_on(Isa path) {
#ifdef GAUGEKIT_X86
    if (path == Isa::avx512) return split_avx512;
    if (path == Isa::avx2) return split_avx2;
#endif
    return split_portable;
  }
  static MergeFunction merge_on(Isa path) {
#ifdef GAUGEKIT_X86
    if (path == Isa::avx512) return merge_avx512;
    if (path == Isa::avx2) return merge_avx2;
#endif
    return merge_portable;
  }
};

inline SplitFunction splitter(int width, int model, Isa path) {
  if (width == 2)
    return model == kExponent ? Planes<uint16_t, kExponent>::split_on(path)
                              : Planes<uint16_t, kHighByte>::split_on(path);
  return model == kExponent ? Planes<uint32_t, kExponent>::split_on(path)
                            : Planes<uint32_t, kHighByte>::split_on(path);
}

inline MergeFunction merger(int width, int model, Isa path) {
  if (width == 2)
    return model == kExponent ? Planes<uint16_t, kExponent>::merge_on(path)
                              : Planes<uint16_t, kHighByte>::merge_on(path);
  return model == kExponent ? Planes<uint32_t, kExponent>::merge_on(path)
                            : Planes<uint32_t, kHighByte>::merge_on(path);
}

}  // namespace gaugekit::rans
