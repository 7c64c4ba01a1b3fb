// Packed weights on NEON, the vectors that every 64-bit ARM has: decoding, and the product of
// packed_linear_product.h in its order of summation. Free of torch.
#pragma once

#include "packed_linear_segment.h"

#ifdef GAUGEKIT_ARM
#include <arm_neon.h>

namespace gaugekit::packed {

// --- step one: bytes of a segment, as in packed_linear_decode.h ---

// Patches the block at `to`, whose escaped weights are `mask`; returns where the next block's escapes begin.
// A block rarely has more than four, and that many are patched without a branch. Where it has fewer, the
// place is the first byte after the block, which the next block writes over. bfloat16's byte is the exponent
// alone, so it is written without being read first.
template <bool HALF, int C>
GAUGEKIT_INLINE const uint8_t* patch_neon(uint8_t* to, uint64_t mask, const uint8_t* next, uint8_t window) {
  const uint8_t outer = static_cast<uint8_t>(window + (1 << C) - 1);
  const int64_t count = __builtin_popcountll(mask);
  for (int i = 0; i < 4 || mask; ++i, mask &= mask - 1) {
    uint8_t* place = to + (mask ? __builtin_ctzll(mask) : BLOCK);
    *place = static_cast<uint8_t>(HALF ? *place ^ next[i] << 2 : next[i] ^ outer);
  }
  return next + count;
}

// A look-up repeats each byte of a plane eight times, and each copy is tested for a bit of its own.
template <bool HALF, int C>
void bytes_neon(const Segment& s, uint8_t* bytes) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
  const uint8x16_t base = vdupq_n_u8(static_cast<uint8_t>(HALF ? s.window << 2 : s.window));
  uint8x16_t spread[4];
  for (int q = 0; q < 4; ++q)
    spread[q] =
        vcombine_u8(vdup_n_u8(static_cast<uint8_t>(2 * q)), vdup_n_u8(static_cast<uint8_t>(2 * q + 1)));
  const uint8_t* next = s.escapes;
  for (int64_t b = 0; b < s.blocks; ++b) {
    uint8x16_t part[4] = {base, base, base, base};
    for (int p = 0; p < planes_of<HALF, C>; ++p) {
      const uint8x16_t plane = vreinterpretq_u8_u64(vdupq_n_u64(s.planes[p * s.stride + b]));
      const uint8x16_t value = vdupq_n_u8(plane_value<HALF, C>(p));
      for (int q = 0; q < 4; ++q) {
        const uint8x16_t set = vtstq_u8(vqtbl1q_u8(plane, spread[q]), bit);
        part[q] = vaddq_u8(part[q], vandq_u8(set, value));
      }
    }
    uint8_t* to = bytes + b * BLOCK;
    for (int q = 0; q < 4; ++q) vst1q_u8(to + 16 * q, part[q]);
    next = patch_neon<HALF, C>(to, escaped<C>(s, b), next, s.window);
  }
}

// --- step two: words ---

// The words of 16 weights in their order. (GCC 12 passes a pair of vectors in one struct through memory.)
template <bool HALF>
GAUGEKIT_INLINE void words_neon(const uint8_t* raw, const uint8_t* bytes, uint16x8_t& first,
                                uint16x8_t& second) {
  const uint8x16_t held = vld1q_u8(raw), byte = vld1q_u8(bytes);
  // bfloat16: below, the exponent's lowest bit before the mantissa; above, the sign before its other seven.
  const uint8x16_t low = HALF ? held : vsliq_n_u8(held, byte, 7);
  const uint8x16_t high = HALF ? byte : vsriq_n_u8(held, byte, 1);
  first = vreinterpretq_u16_u8(vzip1q_u8(low, high)), second = vreinterpretq_u16_u8(vzip2q_u8(low, high));
}

template <bool HALF>
void join_neon(const uint8_t* raw, const uint8_t* bytes, int64_t blocks, uint16_t* out) {
  for (int64_t i = 0; i < blocks * BLOCK; i += 16) {
    uint16x8_t first, second;
    words_neon<HALF>(raw + i, bytes + i, first, second);
    vst1q_u16(out + i, first);
    vst1q_u16(out + i + 8, second);
  }
}

// --- the product ---

// Words 16q.. of a block.
template <bool HALF, bool PLAIN>
GAUGEKIT_INLINE void load_words(const uint8_t* raw, const uint8_t* bytes, int q, uint16x8_t& first,
                                uint16x8_t& second) {
  if (!PLAIN) return words_neon<HALF>(raw + 16 * q, bytes + 16 * q, first, second);
  first = vreinterpretq_u16_u8(vld1q_u8(raw + 32 * q));
  second = vreinterpretq_u16_u8(vld1q_u8(raw + 32 * q + 16));
}

// Words 16q.. of a block fill lanes 4q.. of the four vectors of sums (bfloat16), or half of vectors q / 2 and
// q / 2 + 2 (float16): position() of packed_linear_product.h. The loops are unrolled by name, since GCC 12
// finds out too late by itself that the sums fit registers.
template <bool HALF, bool PLAIN>
void multiply_neon(const Tile& f) {
  float32x4_t sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = vld1q_f32(f.sums + 4 * i);
  for (int64_t b = 0; b < f.blocks; ++b) {
    const float* x = f.x + b * BLOCK;
    const auto add = [&sum, x](int i, float32x4_t w) { sum[i] = vfmaq_f32(sum[i], w, vld1q_f32(x + 4 * i)); };
    __builtin_prefetch(f.next + b * STRIDE<PLAIN>);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      uint16x8_t words[2];
      load_words<HALF, PLAIN>(f.raw + b * STRIDE<PLAIN>, f.bytes + b * BLOCK, q, words[0], words[1]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        if (HALF) {
          const float16x8_t half = vreinterpretq_f16_u16(words[h]);
          const int i = 4 * (2 * h + q / 2) + 2 * (q % 2);
          add(i, vcvt_f32_f16(vget_low_f16(half)));
          add(i + 1, vcvt_high_f32_f16(half));
        } else {
          const uint32x4_t pair = vreinterpretq_u32_u16(words[h]);
          add(8 * h + q, vreinterpretq_f32_u32(vshlq_n_u32(pair, 16)));
          add(8 * h + 4 + q, vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000u))));
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) vst1q_f32(f.sums + 4 * i, sum[i]);
}

}  // namespace gaugekit::packed
#endif
