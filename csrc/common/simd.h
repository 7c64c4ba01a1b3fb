// Vectors of W accumulators, and loads and stores that convert from and to the four storage types. Written
// with the compiler's own vector types, so that one source serves every instruction set; everything is
// inlined into the function that carries the target attribute.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.h"

namespace gaugekit {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Sums are held in float, of double in double.
template <class S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class S>
using accumulator = typename Accumulator<S>::type;

// `body`<S, W> compiled for each instruction set, W accumulators of S to a register, and `name`<S> choosing
// at run time.
#define GAUGEKIT_KERNEL(name, body, parameters, arguments)                                          \
  GAUGEKIT_EACH_ISA((class S), name, parameters, body<S, BYTES / sizeof(accumulator<S>)> arguments) \
  template <class S>                                                                                \
  void name parameters {                                                                            \
    GAUGEKIT_RUN(name, <S> arguments);                                                              \
  }

template <class A, int W>
struct VectorOf {
  typedef A type __attribute__((vector_size(sizeof(A) * W)));
};
template <class A, int W>
using Vector = typename VectorOf<A, W>::type;

template <class To, class From>
GAUGEKIT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit cast between sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A, int W>
GAUGEKIT_INLINE Vector<A, W> splat(A value) {
  return Vector<A, W>{} + value;
}

// --- decode: W stored elements to accumulators ---
template <int W>
GAUGEKIT_INLINE Vector<float, W> widen(Vector<uint16_t, W> raw, BFloat16) {
  return bits_as<Vector<float, W>>(__builtin_convertvector(raw, Vector<uint32_t, W>) << 16);
}

template <int W>
GAUGEKIT_INLINE Vector<float, W> widen(Vector<uint16_t, W> raw, Float16) {
  using U = Vector<uint32_t, W>;
  const U half = __builtin_convertvector(raw, U);
  const U magnitude = (half & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent's bias and makes subnormal halves normal floats.
  const U finite = bits_as<U>(bits_as<Vector<float, W>>(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7f800000u;
  const U result = magnitude >= 0x0f800000u ? special : finite;
  return bits_as<Vector<float, W>>(result | ((half & 0x8000) << 16));
}

// --- encode: accumulators to W stored elements, round to nearest even ---
template <int W>
GAUGEKIT_INLINE Vector<uint16_t, W> narrow(Vector<float, W> value, BFloat16) {
  using U = Vector<uint32_t, W>;
  const U raw = bits_as<U>(value);
  const U rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  const U quiet = (raw >> 16) | 0x40u;
  const U result = (raw & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  return __builtin_convertvector(result, Vector<uint16_t, W>);
}

template <int W>
GAUGEKIT_INLINE Vector<uint16_t, W> narrow(Vector<float, W> value, Float16) {
  using U = Vector<uint32_t, W>;
  using F = Vector<float, W>;
  const U raw = bits_as<U>(value), magnitude = raw & 0x7fffffffu;
  const U zero = U{};
  const U special = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
  // Adding 0.5 aligns a result below 2^-14 so that the float's own rounding is the half's.
  const U subnormal = bits_as<U>(F(bits_as<F>(magnitude) + 0.5f)) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U small = magnitude < 0x38800000u ? subnormal : normal;
  const U result = magnitude >= 0x47800000u ? special : small;
  return __builtin_convertvector(result | ((raw >> 16) & 0x8000u), Vector<uint16_t, W>);
}

// --- loads and stores, of W elements or (in a row's tail) of the first `count` ---
template <class R, int W, class S>
GAUGEKIT_INLINE Vector<R, W> read(const S* from, int64_t count) {
  static_assert(sizeof(R) == sizeof(S), "raw type of another size");
  Vector<R, W> raw{};
  if (count >= W) {
    std::memcpy(&raw, from, sizeof(raw));
  } else {
    R part[W] = {};
    for (int64_t i = 0; i < count; ++i) std::memcpy(&part[i], from + i, sizeof(R));
    std::memcpy(&raw, part, sizeof(raw));
  }
  return raw;
}

template <class R, int W, class S>
GAUGEKIT_INLINE void write(S* to, Vector<R, W> raw, int64_t count) {
  if (count >= W) {
    std::memcpy(to, &raw, sizeof(raw));
  } else {
    R part[W];
    std::memcpy(part, &raw, sizeof(raw));
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i, &part[i], sizeof(R));
  }
}

template <int W>
GAUGEKIT_INLINE Vector<float, W> load(const float* from, int64_t count) {
  return read<float, W>(from, count);
}
template <int W>
GAUGEKIT_INLINE Vector<double, W> load(const double* from, int64_t count) {
  return read<double, W>(from, count);
}
template <int W>
GAUGEKIT_INLINE Vector<float, W> load(const BFloat16* from, int64_t count) {
  return widen<W>(read<uint16_t, W>(from, count), BFloat16{});
}
template <int W>
GAUGEKIT_INLINE Vector<float, W> load(const Float16* from, int64_t count) {
  return widen<W>(read<uint16_t, W>(from, count), Float16{});
}

template <int W>
GAUGEKIT_INLINE void store(float* to, Vector<float, W> value, int64_t count) {
  write<float, W>(to, value, count);
}
template <int W>
GAUGEKIT_INLINE void store(double* to, Vector<double, W> value, int64_t count) {
  write<double, W>(to, value, count);
}
template <int W>
GAUGEKIT_INLINE void store(BFloat16* to, Vector<float, W> value, int64_t count) {
  write<uint16_t, W>(to, narrow<W>(value, BFloat16{}), count);
}
template <int W>
GAUGEKIT_INLINE void store(Float16* to, Vector<float, W> value, int64_t count) {
  write<uint16_t, W>(to, narrow<W>(value, Float16{}), count);
}

}  // namespace gaugekit
