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

// x as words, zero beyond its columns: [batch][row_stride].
inline Halves arrange_pairs(const BFloat16* x, int64_t batch, int64_t columns, int64_t blocks) {
  Halves arranged = halves(batch * row_stride(blocks));
  for (int64_t t = 0; t < batch; ++t) {
    uint16_t* to = arranged[0].at + t * row_stride(blocks);
    std::memcpy(to, x + t * columns, columns * sizeof(BFloat16));
    std::memset(to + columns, 0, (blocks * BLOCK - columns) * sizeof(uint16_t));
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

// The total of a row's sums, which are used up.
GAUGEKIT_BFDOT_INLINE float total(float32x4_t* sum) {
  for (int w = VECTORS / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) sum[i] = vaddq_f32(sum[i], sum[i + w]);
  const float32x2_t two = vadd_f32(vget_low_f32(sum[0]), vget_high_f32(sum[0]));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

// T rows of x, at most FEW.
template <int C, bool PLAIN, int T, class Give>
GAUGEKIT_BFDOT void multiply_few(const Weight& w, int64_t begin, int64_t end, const uint16_t* x,
                                 const Give& give) {
  Vector<float, ROWS> found[T];
  for (int64_t row = begin; row < end; ++row) {
    float32x4_t sum[T][VECTORS];
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < VECTORS; ++i) sum[t][i] = vdupq_n_f32(0);
    each_block<C, PLAIN>(w, row, [&](int64_t b, const uint16x8_t* words) GAUGEKIT_BFDOT {
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < VECTORS; ++i) {
          const uint16_t* from = x + t * row_stride(w.blocks) + b * BLOCK + i * VECTOR_WORDS;
          sum[t][i] = add_pairs(sum[t][i], words[i], vld1q_u16(from));
        }
    });
    const int64_t r = (row - begin) % ROWS;
    for (int t = 0; t < T; ++t) found[t][r] = total(sum[t]);
    if (r == ROWS - 1 || row + 1 == end)
      for (int t = 0; t < T; ++t) give(t, row - r, found[t], r + 1);
  }
}

// The totals of TILE_W decoded rows of W and T rows of x: to[t * MOST_ROWS + r]. Their columns go part by
// part, for which the first-level cache has room, and of each block one vector at a time, for which all sums
// stay in registers.
template <int T>
GAUGEKIT_BFDOT void multiply_tile(const uint16_t* words, const uint16_t* x, int64_t blocks, Ahead& ahead,
                                  float* to) {
  constexpr int64_t PART_BLOCKS = 32;
  const int64_t stride = row_stride(blocks);
  float32x4_t sums[T][TILE_W][VECTORS];
  for (int i = 0; i < T * TILE_W * VECTORS; ++i) sums[0][0][i] = vdupq_n_f32(0);
  for (int64_t b = 0; b < blocks; b += PART_BLOCKS) {
    const int64_t stop = std::min(blocks, b + PART_BLOCKS) * BLOCK;
    for (int i = 0; i < VECTORS; ++i) {
      float32x4_t sum[T][TILE_W];
      for (int t = 0; t < T; ++t)
        for (int r = 0; r < TILE_W; ++r) sum[t][r] = sums[t][r][i];
      for (int64_t at = b * BLOCK + i * VECTOR_WORDS; at < stop; at += BLOCK) {
        uint16x8_t held[TILE_W];
        for (int r = 0; r < TILE_W; ++r) held[r] = vld1q_u16(words + r * stride + at);
        for (int t = 0; t < T; ++t) {
          const uint16x8_t from = vld1q_u16(x + t * stride + at);
          for (int r = 0; r < TILE_W; ++r) sum[t][r] = add_pairs(sum[t][r], held[r], from);
        }
      }
      for (int t = 0; t < T; ++t)
        for (int r = 0; r < TILE_W; ++r) sums[t][r][i] = sum[t][r];
      ahead.ask();
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < TILE_W; ++r) to[t * MOST_ROWS + r] = total(sums[t][r]);
}

// The words of row `row` of W, block after block.
template <int C, bool PLAIN>
GAUGEKIT_BFDOT_INLINE void decode_pairs(const Weight& w, int64_t row, uint16_t* to) {
  each_block<C, PLAIN>(w, row, [&](int64_t b, const uint16x8_t* words) GAUGEKIT_BFDOT {
    for (int i = 0; i < VECTORS; ++i) vst1q_u16(to + b * BLOCK + i * VECTOR_WORDS, words[i]);
  });
}

}  // namespace gaugekit::packed
#endif
