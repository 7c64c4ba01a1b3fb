// The parts of the product on pairs of bfloat16 numbers (packed_linear_pairs.h) that are ARM's (BF16's
// bfdot). A segment's planes are decoded to bytes at once, and its words joined block by block, in registers.
// Free of torch.
//
// The order of summation is fixed, the same for every batch, and ARM's own. Words 2j and 2j + 1 of a block
// are pair j, which is added to one of 32 running float sums, j, as the instruction does it (bfdot, to which
// subnormal numbers are zero and which rounds to odd), block after block; at a row's end sum is halved by
// sum[j] += sum[j + w], w = 16, 8, 4, 2, 1.
#pragma once

#include "packed_linear_pair_layout.h"

#ifdef GAUGEKIT_ARM
#define GAUGEKIT_PAIRS GAUGEKIT_BFDOT
#define GAUGEKIT_BFDOT_INLINE GAUGEKIT_BFDOT __attribute__((always_inline)) inline

namespace gaugekit::packed {

constexpr Isa PAIRS_LEVEL = Isa::bfdot;
constexpr bool PAIRS_OF_E5M2 = false;  // they take the product of packed_linear_product.h
constexpr int VECTORS = 8;             // of a block's words, and of a row's sums
constexpr int HALF_VECTORS = VECTORS / 2;
constexpr int64_t VECTOR_WORDS = BLOCK / VECTORS;

// x as words, zero beyond its columns: [batch][2][blocks + 1][32].
inline std::vector<WordHalf> arrange_pairs(const BFloat16* x, int64_t batch, int64_t columns,
                                           int64_t blocks) {
  std::vector<WordHalf> arranged(batch * row_stride(blocks) / HALF_BLOCK);
  for (int64_t t = 0; t < batch; ++t)
    for (int64_t k = 0; k < columns; k += HALF_BLOCK) {
      uint16_t* half = arranged[0].at + t * row_stride(blocks) + k / HALF_BLOCK % 2 * half_stride(blocks);
      std::memcpy(half + k / BLOCK * HALF_BLOCK, x + t * columns + k,
                  std::min(HALF_BLOCK, columns - k) * sizeof(BFloat16));
    }
  return arranged;
}

GAUGEKIT_BFDOT_INLINE float32x4_t add_pairs(float32x4_t sum, uint16x8_t w, uint16x8_t x) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_u16(w), vreinterpretq_bf16_u16(x));
}

// Row `row` of W, block after block: take(b, words).
template <int C, bool PLAIN, class Take>
GAUGEKIT_BFDOT_INLINE void each_block(const Weight& w, int64_t row, const Take& take) {
  alignas(64) uint8_t bytes[SEGMENT + SLACK], tail[SEGMENT + SLACK];
  int64_t b = 0;
  for (int64_t s = 0; s < w.segments(); ++s) {
    const uint8_t *raw = begin_of<PLAIN>(w, row, s), *byte = bytes;
    if (!PLAIN) bytes_neon<false, C>(segment_of(w, row, s, tail), bytes);
    for (const int64_t stop = b + w.blocks_of(s); b < stop; ++b, raw += STRIDE<PLAIN>, byte += BLOCK) {
      uint16x8_t words[VECTORS];
      for (int q = 0; q < VECTORS / 2; ++q)
        load_words<false, PLAIN>(raw, byte, q, words[2 * q], words[2 * q + 1]);
      take(b, words);
    }
  }
}

// The totals of ROWS rows' sums, [ROWS][32].
inline Vector<float, ROWS> totals(const float* sums) {
  Vector<float, ROWS> out{};
  for (int r = 0; r < ROWS; ++r, sums += SUMS) {
    float32x4_t t[VECTORS];
    for (int i = 0; i < VECTORS; ++i) t[i] = vld1q_f32(sums + 4 * i);
    for (int w = VECTORS / 2; w; w /= 2)
      for (int i = 0; i < w; ++i) t[i] = vaddq_f32(t[i], t[i + w]);
    const float32x2_t two = vadd_f32(vget_low_f32(t[0]), vget_high_f32(t[0]));
    out[r] = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  return out;
}

// T rows of x, at most FEW.
template <int C, bool PLAIN, int T, class Give>
GAUGEKIT_BFDOT void multiply_few(const Weight& w, int64_t begin, int64_t end, const uint16_t* x,
                                 const Give& give) {
  alignas(64) float sums[T][ROWS * SUMS];
  const int64_t half = half_stride(w.blocks), stride = row_stride(w.blocks);
  for (int64_t row = begin; row < end; ++row) {
    float32x4_t sum[T][VECTORS];
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < VECTORS; ++i) sum[t][i] = vdupq_n_f32(0);
    each_block<C, PLAIN>(w, row, [&](int64_t b, const uint16x8_t* words) GAUGEKIT_BFDOT {
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < VECTORS; ++i) {
          const uint16_t* from = x + t * stride + b * HALF_BLOCK + i / HALF_VECTORS * half;
          sum[t][i] = add_pairs(sum[t][i], words[i], vld1q_u16(from + i % HALF_VECTORS * VECTOR_WORDS));
        }
    });
    const int64_t r = (row - begin) % ROWS;
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < VECTORS; ++i) vst1q_f32(sums[t] + SUMS * r + 4 * i, sum[t][i]);
    if (r == ROWS - 1 || row + 1 == end)
      for (int t = 0; t < T; ++t) give(t, row - r, totals(sums[t]), r + 1);
  }
}

// The sums [T][ROWS][32] of R rows of W and T rows of x, `blocks` blocks further; FIRST begins them. Rows are
// `stride` words apart. One vector of each block's words at a time, for which all sums stay in registers.
template <int R, int T, bool FIRST>
GAUGEKIT_BFDOT void multiply_tile(const uint16_t* words, const uint16_t* x, int64_t stride, int64_t blocks,
                                  float* sums) {
  for (int i = 0; i < VECTORS; ++i, sums += 4) {
    const int64_t begin = i / HALF_VECTORS * stride / 2 + i % HALF_VECTORS * VECTOR_WORDS;
    float32x4_t sum[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        sum[r][t] = FIRST ? vdupq_n_f32(0) : vld1q_f32(sums + (t * ROWS + r) * SUMS);
    for (int64_t at = begin; at < begin + blocks * HALF_BLOCK; at += HALF_BLOCK) {
      uint16x8_t held[R];
      for (int r = 0; r < R; ++r) held[r] = vld1q_u16(words + r * stride + at);
      for (int t = 0; t < T; ++t) {
        const uint16x8_t from = vld1q_u16(x + t * stride + at);
        for (int r = 0; r < R; ++r) sum[r][t] = add_pairs(sum[r][t], held[r], from);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) vst1q_f32(sums + (t * ROWS + r) * SUMS, sum[r][t]);
  }
}

// The words of row `row` of W, [2][blocks + 1][32].
template <int C, bool PLAIN>
GAUGEKIT_BFDOT_INLINE void decode_pairs(const Weight& w, int64_t row, uint16_t* to) {
  each_block<C, PLAIN>(w, row, [&](int64_t b, const uint16x8_t* words) GAUGEKIT_BFDOT {
    for (int i = 0; i < VECTORS; ++i)
      vst1q_u16(
          to + b * HALF_BLOCK + i / HALF_VECTORS * half_stride(w.blocks) + i % HALF_VECTORS * VECTOR_WORDS,
          words[i]);
  });
}

}  // namespace gaugekit::packed
#endif
