// y = x Wᵀ in bfloat16 for up to a few hundred rows of x on processors that multiply pairs of bfloat16
// numbers by themselves: AVX512-BF16, whose parts are here, and ARM's BF16 (packed_linear_bfdot.h). Up to FEW
// rows of x take each block of W as it is decoded. For more, ROWS rows of W are decoded into the second-level
// cache and multiplied by tiles of R × T sums that stay in registers. Free of torch.
//
// The order of summation is fixed, the same for every batch, and other than that of packed_linear_product.h.
// With AVX512-BF16 the words of a block lie in two halves of 32, as words_of leaves them. Pair j of half h is
// added to one of 32 running float sums, (h, j), as the instruction does it (vdpbf16ps, to which subnormal
// numbers are zero), block after block; at a row's end t[j] = sum[0][j] + sum[1][j], and then t is halved by
// t[j] += t[j + w], w = 8, 4, 2, 1.
#pragma once

#include "packed_linear_bfdot.h"
#include "packed_linear_pair_layout.h"

namespace gaugekit::packed {

#ifdef GAUGEKIT_X86
#define GAUGEKIT_PAIRS GAUGEKIT_BF16

constexpr Isa PAIRS_LEVEL = Isa::bf16;
constexpr bool PAIRS_OF_E5M2 = true;

// x as words in the order of the sums, zero beyond its columns: [batch][2][blocks + 1][32].
GAUGEKIT_BF16 inline std::vector<WordHalf> arrange_pairs(const BFloat16* x, int64_t batch, int64_t columns,
                                                         int64_t blocks) {
  std::vector<WordHalf> arranged(batch * row_stride(blocks) / HALF_BLOCK);
  for (int64_t t = 0; t < batch; ++t) {
    const BFloat16* from = x + t * columns;
    uint16_t* to = arranged[0].at + t * row_stride(blocks);
    for (int64_t b = 0; b < blocks; ++b, from += BLOCK, to += HALF_BLOCK) {
      const int64_t count = std::min(BLOCK, columns - b * BLOCK);
      BFloat16 last[BLOCK] = {};
      if (count < BLOCK) std::memcpy(last, from, count * sizeof(BFloat16));
      __m512i lo, hi;
      load_words<false, true>(reinterpret_cast<const uint8_t*>(count < BLOCK ? last : from), nullptr, lo, hi);
      _mm512_store_si512(to, lo);
      _mm512_store_si512(to + half_stride(blocks), hi);
    }
  }
  return arranged;
}

GAUGEKIT_BF16_INLINE __m512 add_pairs(__m512 sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}

// Row `row` of W, block after block: take(b, lo, hi). What is asked for ahead walks steadily through the
// row's planes, which lie one after the other, so far ahead that the last one comes in time, too.
template <int C, bool PLAIN, class Take>
GAUGEKIT_BF16_INLINE void each_block(const Weight& w, int64_t row, const Take& take) {
  constexpr int64_t PLANE_BYTES = C * 8;  // a block's
  const int64_t planes_ahead = (C - 1) * 8 * w.blocks + AHEAD_BLOCKS * PLANE_BYTES;
  alignas(64) uint8_t tail[SEGMENT + SLACK];
  int64_t b = 0;
  for (int64_t s = 0; s < w.segments(); ++s) {
    Segment g{};
    if (!PLAIN) g = segment_of(w, row, s, tail);
    g.raw = begin_of<PLAIN>(w, row, s);
    const uint8_t* next = g.escapes;
    const char* planes =
        reinterpret_cast<const char*>(w.planes) + (row * w.blocks + b) * PLANE_BYTES + planes_ahead;
    if (!PLAIN) {
      _mm_prefetch(reinterpret_cast<const char*>(next + 256), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(w.offsets + row * w.segments() + s + 32), _MM_HINT_T0);
    }
    for (const int64_t stop = b + w.blocks_of(s); b < stop; ++b) {
      _mm_prefetch(reinterpret_cast<const char*>(g.raw + AHEAD_BLOCKS * BLOCK), _MM_HINT_T0);
      if (!PLAIN) _mm_prefetch(planes, _MM_HINT_T0);
      __m512i lo, hi;
      if (PLAIN)
        load_words<false, true>(g.raw, nullptr, lo, hi);
      else
        bfloat16_words<C>(g, next, lo, hi);
      take(b, lo, hi);
      g.raw += STRIDE<PLAIN>, ++g.planes, planes += PLANE_BYTES;
    }
  }
}

// The totals of ROWS rows' sums, [ROWS][2][16].
GAUGEKIT_BF16_INLINE Vector<float, ROWS> totals(const float* sums) {
  const auto both = [sums](int row) GAUGEKIT_BF16 {
    return _mm512_add_ps(_mm512_load_ps(sums + SUMS * row), _mm512_load_ps(sums + SUMS * row + 16));
  };
  // Each step halves the numbers left of a row, and the vectors: two rows share one.
  __m512 t[ROWS / 2];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = both(i), b = both(i + 4);
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 2; ++i)
    t[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(t[i], t[i + 2], 0x88), _mm512_shuffle_f32x4(t[i], t[i + 2], 0xdd));
  t[0] = _mm512_add_ps(_mm512_shuffle_ps(t[0], t[1], 0x44), _mm512_shuffle_ps(t[0], t[1], 0xee));
  t[0] = _mm512_add_ps(t[0], _mm512_permute_ps(t[0], 0xb1));
  const __m512i rows = _mm512_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  return bits_as<Vector<float, ROWS>>(_mm512_castps512_ps256(_mm512_permutexvar_ps(rows, t[0])));
}

// T rows of x, at most FEW.
template <int C, bool PLAIN, int T, class Give>
GAUGEKIT_BF16 void multiply_few(const Weight& w, int64_t begin, int64_t end, const uint16_t* x,
                                const Give& give) {
  alignas(64) float sums[T][ROWS * SUMS];
  for (int64_t row = begin; row < end; ++row) {
    __m512 lo_sum[T], hi_sum[T];
    for (int t = 0; t < T; ++t) lo_sum[t] = hi_sum[t] = _mm512_setzero_ps();
    each_block<C, PLAIN>(w, row, [&](int64_t b, __m512i lo, __m512i hi) GAUGEKIT_BF16 {
      for (int t = 0; t < T; ++t) {
        const uint16_t* from = x + t * row_stride(w.blocks) + b * HALF_BLOCK;
        lo_sum[t] = add_pairs(lo_sum[t], lo, _mm512_load_si512(from));
        hi_sum[t] = add_pairs(hi_sum[t], hi, _mm512_load_si512(from + half_stride(w.blocks)));
      }
    });
    const int64_t r = (row - begin) % ROWS;
    for (int t = 0; t < T; ++t) {
      _mm512_store_ps(sums[t] + SUMS * r, lo_sum[t]);
      _mm512_store_ps(sums[t] + SUMS * r + 16, hi_sum[t]);
    }
    if (r == ROWS - 1 || row + 1 == end)
      for (int t = 0; t < T; ++t) give(t, row - r, totals(sums[t]), r + 1);
  }
}

// The sums [T][ROWS][2][16] of R rows of W and T rows of x, `blocks` blocks further; FIRST begins them. Rows
// are `stride` words apart.
template <int R, int T, bool FIRST>
GAUGEKIT_BF16 void multiply_tile(const uint16_t* words, const uint16_t* x, int64_t stride, int64_t blocks,
                                 float* sums) {
  for (int h = 0; h < 2; ++h, words += stride / 2, x += stride / 2, sums += 16) {
    __m512 sum[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        sum[r][t] = FIRST ? _mm512_setzero_ps() : _mm512_load_ps(sums + (t * ROWS + r) * SUMS);
    for (int64_t at = 0; at < blocks * HALF_BLOCK; at += HALF_BLOCK) {
      __m512i held[R];
      for (int r = 0; r < R; ++r) held[r] = _mm512_load_si512(words + r * stride + at);
      for (int t = 0; t < T; ++t) {
        const __m512i from = _mm512_load_si512(x + t * stride + at);
        for (int r = 0; r < R; ++r) sum[r][t] = add_pairs(sum[r][t], held[r], from);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) _mm512_store_ps(sums + (t * ROWS + r) * SUMS, sum[r][t]);
  }
}

// The words of row `row` of W, [2][blocks + 1][32].
template <int C, bool PLAIN>
GAUGEKIT_BF16_INLINE void decode_pairs(const Weight& w, int64_t row, uint16_t* to) {
  each_block<C, PLAIN>(w, row, [&](int64_t b, __m512i lo, __m512i hi) GAUGEKIT_BF16 {
    _mm512_store_si512(to + b * HALF_BLOCK, lo);
    _mm512_store_si512(to + b * HALF_BLOCK + half_stride(w.blocks), hi);
  });
}
#endif

#ifdef GAUGEKIT_PAIRS
// A part of ROWS decoded rows of W times the same of `batch` rows of x, at most PASS_ROWS.
template <bool FIRST>
void multiply_part(const uint16_t* words, const uint16_t* x, int64_t batch, int64_t stride, int64_t blocks,
                   float* sums) {
  constexpr int R = 4, MOST = 6;  // 24 sums stay in registers, beside four vectors of W and one of x
  using Tile = void (*)(const uint16_t*, const uint16_t*, int64_t, int64_t, float*);
  constexpr Tile of_rows[] = {multiply_tile<R, 1, FIRST>, multiply_tile<R, 2, FIRST>,
                              multiply_tile<R, 3, FIRST>, multiply_tile<R, 4, FIRST>,
                              multiply_tile<R, 5, FIRST>, multiply_tile<R, 6, FIRST>};
  const int64_t tiles = (batch + MOST - 1) / MOST;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = batch * tile / tiles, count = batch * (tile + 1) / tiles - first;
    for (int r = 0; r < ROWS; r += R)
      of_rows[count - 1](words + r * stride, x + first * stride, stride, blocks,
                         sums + (first * ROWS + r) * SUMS);
  }
}

// The sums of ROWS decoded rows of W and `batch` rows of x, part by part of their columns.
inline void multiply_group(const uint16_t* words, const uint16_t* x, int64_t batch, int64_t blocks,
                           float* sums) {
  const int64_t stride = row_stride(blocks);
  for (int64_t b = 0; b < blocks; b += PART_BLOCKS)
    (b == 0 ? multiply_part<true> : multiply_part<false>)(words + b * HALF_BLOCK, x + b * HALF_BLOCK, batch,
                                                          stride, std::min(PART_BLOCKS, blocks - b), sums);
}

template <int C, bool PLAIN, class Give>
GAUGEKIT_PAIRS void multiply_many(const Weight& w, int64_t begin, int64_t end, const uint16_t* x,
                                  int64_t batch, const Give& give) {
  const int64_t stride = row_stride(w.blocks), passes = (batch + PASS_ROWS - 1) / PASS_ROWS;
  std::vector<WordHalf> decoded(ROWS * stride / HALF_BLOCK);
  std::vector<FloatBlock> sums(std::min(batch, PASS_ROWS) * ROWS * SUMS / BLOCK);
  for (int64_t first = begin; first < end; first += ROWS) {
    const int64_t rows =
        std::min<int64_t>(ROWS, end - first);  // others are left of the group before, or zero
    for (int64_t r = 0; r < rows; ++r) decode_pairs<C, PLAIN>(w, first + r, decoded[0].at + r * stride);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t from = batch * pass / passes, count = batch * (pass + 1) / passes - from;
      multiply_group(decoded[0].at, x + from * stride, count, w.blocks, sums[0].at);
      for (int64_t t = 0; t < count; ++t) give(from + t, first, totals(sums[0].at + t * ROWS * SUMS), rows);
    }
  }
}

template <int C, bool PLAIN, class Give>
void pairs(const Weight& w, int64_t begin, int64_t end, const uint16_t* x, int64_t batch, const Give& give) {
  switch (batch) {
    case 1:
      return multiply_few<C, PLAIN, 1>(w, begin, end, x, give);
    case 2:
      return multiply_few<C, PLAIN, 2>(w, begin, end, x, give);
    case 3:
      return multiply_few<C, PLAIN, 3>(w, begin, end, x, give);
    case FEW:
      return multiply_few<C, PLAIN, FEW>(w, begin, end, x, give);
    default:
      return multiply_many<C, PLAIN>(w, begin, end, x, batch, give);
  }
}

// Rows [begin, end) of W, bfloat16 or E5M2, times `batch` rows of x, arranged by arrange_pairs:
// give(batch row, row, sums, count) is called for each ROWS rows, of which the first `count` have sums.
template <bool PLAIN = false, class Give>
void product_of_pairs(const Weight& w, int64_t begin, int64_t end, const uint16_t* x, int64_t batch,
                      const Give& give) {
  if constexpr (PAIRS_OF_E5M2)
    if (w.e5m2())
      return w.code_bits() == 3 ? pairs<6, PLAIN>(w, begin, end, x, batch, give)
                                : pairs<7, PLAIN>(w, begin, end, x, batch, give);
  return w.code_bits() == 3 ? pairs<3, PLAIN>(w, begin, end, x, batch, give)
                            : pairs<4, PLAIN>(w, begin, end, x, batch, give);
}
#endif

}  // namespace gaugekit::packed
