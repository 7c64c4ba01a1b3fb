// Elements to symbols and raw byte planes, and back (docs/format.md, "Elements"). Plain loops the compiler
// vectorises.
#pragma once

#include <algorithm>
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

// Model 2: the exponent and the two highest mantissa bits as a byte (see Table), sign and the other mantissa
// bits as six bits.
GAUGEKIT_INLINE void split_with_six(const uint8_t* __restrict in, uint64_t n, int shift,
                                    uint8_t* __restrict symbols, uint8_t* __restrict six) {
  for (uint64_t i = 0; i < n; ++i) {
    const uint16_t x = load<uint16_t>(in + 2 * i), symbol = x >> 5 & 1023;
    symbols[i] = uint8_t(symbol < kZeroSymbols ? symbol : symbol - shift);
    six[i] = uint8_t((x >> 10 & 32) | (x & 31));
  }
}

GAUGEKIT_INLINE void merge_with_six(const uint8_t* __restrict symbols, const uint8_t* __restrict six,
                                    uint64_t n, int shift, uint8_t* __restrict out) {
  for (uint64_t i = 0; i < n; ++i) {
    const uint16_t symbol = symbols[i] < kZeroSymbols ? symbols[i] : symbols[i] + shift;
    store<uint16_t>(out + 2 * i, uint16_t(symbol << 5 | (six[i] & 32) << 10 | (six[i] & 31)));
  }
}

// 64 values of six bits in 48 bytes: the first 48 in the low six bits, the last 16 in the high two, two bits
// of each in each third.
inline void pack_six(const uint8_t* __restrict six, uint8_t* __restrict out) {
  for (int third = 0; third < 3; ++third)
    for (int i = 0; i < 16; ++i)
      out[16 * third + i] = uint8_t(six[16 * third + i] | (six[48 + i] >> (2 * third) & 3) << 6);
}

inline void unpack_six(const uint8_t* __restrict in, uint8_t* __restrict six) {
  for (int i = 0; i < 48; ++i) six[i] = in[i] & 63;
  for (int i = 0; i < 16; ++i)
    six[48 + i] = uint8_t(in[i] >> 6 | (in[16 + i] >> 6) << 2 | (in[32 + i] >> 6) << 4);
}

// The shift of a chunk's Table; -1 if its exponents are too far apart for model 2.
inline int table_shift(const uint8_t* in, uint64_t n) {
  constexpr uint16_t kExponentBits = 0x7F80, kOne = 0x80;
  uint16_t least = kExponentBits, most = 0;  // of the exponents above 0, less one; and of all
  for (uint64_t i = 0; i < n; ++i) {
    const uint16_t exponent = load<uint16_t>(in + 2 * i) & kExponentBits;
    least = std::min(least, uint16_t(exponent - kOne));
    most = std::max(most, exponent);
  }
  const int first = (least >> 7) + 1, last = most >> 7;
  if (last == 0) return 0;
  return last - first < kMaxExponents ? 4 * first - kZeroSymbols : -1;
}

// The last argument is the shift of the chunk's Table; models 0 and 1 do not look at it.
using SplitFunction = void (*)(const uint8_t*, uint64_t, uint8_t*, uint8_t* const*, int);
using MergeFunction = void (*)(const uint8_t*, const uint8_t* const*, uint64_t, uint8_t*, int);

// One loop, compiled for each instruction set.
template <class T, int model>
GAUGEKIT_INLINE void split_by(const uint8_t* in, uint64_t n, uint8_t* symbols, uint8_t* const* planes,
                              int shift) {
  if constexpr (model == kExponentAndTwo)
    split_with_six(in, n, shift, symbols, planes[0]);
  else if constexpr (sizeof(T) == 1)
    std::memcpy(symbols, in, n);
  else
    split<T, model>(in, n, symbols, planes);
}

template <class T, int model>
GAUGEKIT_INLINE void merge_by(const uint8_t* symbols, const uint8_t* const* planes, uint64_t n, uint8_t* out,
                              int shift) {
  if constexpr (model == kExponentAndTwo)
    merge_with_six(symbols, planes[0], n, shift, out);
  else if constexpr (sizeof(T) == 1)
    std::memcpy(out, symbols, n);
  else
    merge<T, model>(symbols, planes, n, out);
}

GAUGEKIT_EACH_ISA((class T, int model), split,
                  (const uint8_t* in, uint64_t n, uint8_t* symbols, uint8_t* const* planes, int shift),
                  split_by<T, model>(in, n, symbols, planes, shift))
GAUGEKIT_EACH_ISA((class T, int model), merge,
                  (const uint8_t* symbols, const uint8_t* const* planes, uint64_t n, uint8_t* out, int shift),
                  merge_by<T, model>(symbols, planes, n, out, shift))

template <class T, int model>
struct Planes {
  static SplitFunction split_on(Isa path) { return GAUGEKIT_FORM(path, split, <T, model>); }
  static MergeFunction merge_on(Isa path) { return GAUGEKIT_FORM(path, merge, <T, model>); }
};

// Calls run(Planes<T, model>) for elements of this width under this model.
template <class Run>
auto with_planes(int width, int model, Run run) {
  if (width == 1) return run(Planes<uint8_t, kHighByte>{});
  if (width == 4)
    return model == kExponent ? run(Planes<uint32_t, kExponent>{}) : run(Planes<uint32_t, kHighByte>{});
  if (model == kExponentAndTwo) return run(Planes<uint16_t, kExponentAndTwo>{});
  return model == kExponent ? run(Planes<uint16_t, kExponent>{}) : run(Planes<uint16_t, kHighByte>{});
}

inline SplitFunction splitter(int width, int model, Isa path) {
  return with_planes(width, model, [=](auto planes) { return planes.split_on(path); });
}

inline MergeFunction merger(int width, int model, Isa path) {
  return with_planes(width, model, [=](auto planes) { return planes.merge_on(path); });
}

}  // namespace gaugekit::rans
