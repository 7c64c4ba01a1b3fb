// What one lane of a warp does in the product with packed weights (docs/resident.md). A warp takes a segment
// of a row, a lane 32 neighbouring weights of it: half a block, one 32-bit word of each plane. Free of CUDA's
// and torch's headers, so that a test runs the same code on the processor, lane by lane.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/lane.h"

namespace gaugekit::packed {

constexpr int kLanes = 32, kLaneWeights = 32, kSegment = kLanes * kLaneWeights;

struct Lanes {
  const uint8_t* raw;
  const uint32_t* planes;  // halves of the 64-bit words
  const uint8_t* escapes;
  const int32_t* offsets;
  const uint8_t* window;
  int64_t rows, blocks, segments, escape_count;
};

struct BFloat16Bits {
  uint16_t bits;
};
struct Float16Bits {
  uint16_t bits;
};

GAUGEKIT_HD GAUGEKIT_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
GAUGEKIT_HD GAUGEKIT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GAUGEKIT_HD GAUGEKIT_INLINE float widen(float x) { return x; }
GAUGEKIT_HD GAUGEKIT_INLINE float widen(BFloat16Bits x) { return float_of(uint32_t(x.bits) << 16); }
GAUGEKIT_HD GAUGEKIT_INLINE float widen(Float16Bits x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent's bias and makes subnormal halves normal floats.
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | uint32_t(x.bits & 0x8000)
                                                                                      << 16);
}

GAUGEKIT_HD GAUGEKIT_INLINE int count_bits(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

// The 32 weights a lane owns, before they are decoded.
template <bool HALF, int C>
struct Lane {
  static constexpr int PLANES = HALF ? C + 3 : C;
  uint32_t raw[kLaneWeights / 4], plane[PLANES];
  uint32_t escaped;  // a bit for each weight whose exponent stands in the stream
};

struct alignas(16) Quad {
  uint32_t word[4];
};

template <bool HALF, int C>
GAUGEKIT_HD GAUGEKIT_INLINE Lane<HALF, C> load_lane(const Lanes& w, int64_t row, int64_t segment, int lane) {
  Lane<HALF, C> own{};
  const int64_t half_block = segment * kLanes + lane;
  if (half_block >= 2 * w.blocks) return own;
  const uint8_t* raw = w.raw + row * w.blocks * 64 + half_block * kLaneWeights;
  for (int q = 0; q < 2; ++q) {
    const Quad quad = reinterpret_cast<const Quad*>(raw)[q];
    for (int i = 0; i < 4; ++i) own.raw[4 * q + i] = quad.word[i];
  }
  const uint32_t* plane = w.planes + row * Lane<HALF, C>::PLANES * 2 * w.blocks + half_block;
  own.escaped = ~0u;
  for (int p = 0; p < Lane<HALF, C>::PLANES; ++p) {
    own.plane[p] = plane[p * 2 * w.blocks];
    if (p < C) own.escaped &= own.plane[p];
  }
  return own;
}

// Where a row's segment begins in the stream, whatever the offsets say.
GAUGEKIT_HD GAUGEKIT_INLINE int64_t begin_of(const Lanes& w, int64_t row, int64_t segment) {
  const int64_t begin = w.offsets[row * w.segments + segment];
  return begin < 0 ? 0 : begin > w.escape_count ? w.escape_count : begin;
}

// Weight i as a 16-bit word; the lane's first escape stands at `begin` of the stream. A byte past its end is
// 0.
template <bool HALF, int C>
GAUGEKIT_HD GAUGEKIT_INLINE uint16_t word_of(const Lanes& w, const Lane<HALF, C>& own, uint32_t window,
                                             int64_t begin, int i) {
  uint32_t exponent = window;
  for (int p = 0; p < C; ++p) exponent += (own.plane[p] >> i & 1u) << p;
  if (own.escaped >> i & 1u) {
    const int64_t place = begin + count_bits(own.escaped & ((1u << i) - 1u));
    if (place < w.escape_count) exponent ^= w.escapes[place];
  }
  const uint32_t raw = own.raw[i / 4] >> 8 * (i % 4) & 0xffu;
  if (!HALF) return static_cast<uint16_t>((raw & 0x80u) << 8 | exponent << 7 | (raw & 0x7fu));
  uint32_t word = raw | exponent << 10;
  for (int p = 0; p < 3; ++p) word |= (own.plane[C + p] >> i & 1u) << (p == 2 ? 15 : 8 + p);
  return static_cast<uint16_t>(word);
}

constexpr int kPart =
    8;  // weights that are decoded at a time: registers hold them beside the sums of 16 rows

// The lane's next kPart weights; `own` and `begin` then stand at the ones after them.
template <bool HALF, int C>
GAUGEKIT_HD GAUGEKIT_INLINE void decode_part(const Lanes& w, Lane<HALF, C>& own, uint32_t window,
                                             int64_t& begin, float weight[kPart]) {
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const uint16_t word = word_of(w, own, window, begin, i);
    weight[i] = HALF ? widen(Float16Bits{word}) : widen(BFloat16Bits{word});
  }
  begin += count_bits(own.escaped & ((1u << kPart) - 1u));
  own.escaped >>= kPart;
#pragma unroll
  for (int p = 0; p < Lane<HALF, C>::PLANES; ++p) own.plane[p] >>= kPart;
#pragma unroll
  for (int i = 0; i + kPart / 4 < kLaneWeights / 4; ++i) own.raw[i] = own.raw[i + kPart / 4];
}

// sum + a part of a row of W times as many numbers of x, at a multiple of 16 bytes; weights in their order.
template <class X>
GAUGEKIT_HD GAUGEKIT_INLINE float part_product(const float weight[kPart], const X* x, float sum) {
  constexpr int EACH = 16 / sizeof(X);
#pragma unroll
  for (int q = 0; q < kPart / EACH; ++q) {
    const Quad quad = reinterpret_cast<const Quad*>(x)[q];
    X value[EACH];
    memcpy(value, &quad, sizeof(quad));
#pragma unroll
    for (int i = 0; i < EACH; ++i) sum += weight[q * EACH + i] * widen(value[i]);
  }
  return sum;
}

// Adds the lane's part of a row of W times `batch` rows x to the sums. x points at the lane's first column in
// the first row, the next row is `stride` further; beyond W's columns it is zero. The loop over the parts
// stays one: unrolled, the compiler moves their loads forward until registers spill.
template <bool HALF, int C, class X, int T>
GAUGEKIT_HD GAUGEKIT_INLINE void multiply_lane(const Lanes& w, Lane<HALF, C> own, uint32_t window,
                                               int64_t begin, const X* x, int64_t stride, int batch,
                                               float sum[T]) {
#pragma unroll 1
  for (int part = 0; part < kLaneWeights / kPart; ++part, x += kPart) {
    float weight[kPart];
    decode_part(w, own, window, begin, weight);
#pragma unroll
    for (int t = 0; t < T; ++t)
      if (t < batch) sum[t] = part_product(weight, x + t * stride, sum[t]);
  }
}

}  // namespace gaugekit::packed
