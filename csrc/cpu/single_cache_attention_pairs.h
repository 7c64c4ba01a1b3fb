// Attention from one cache in bfloat16 on processors that multiply pairs of bfloat16 numbers by themselves
// (AVX512-BF16, as ragged_attention_pairs.h): scores and weighted sums of one block of the cache. Free of
// torch.
//
// Rows of the cache are multiplied where they lie. Two neighbouring channels are a pair already; two
// neighbouring rows become one in registers, for all the queries of a tile. The softmax's numerators and keys
// turned by their position are rounded to bfloat16, sums are float. Every score is one chain of additions a
// lane, every sum one along the pairs of rows, whatever tile computes it.
#pragma once

#include "cpu/ragged_attention_pairs.h"
#include "cpu/single_cache_attention_split.h"

#ifdef GAUGEKIT_X86
namespace gaugekit {

constexpr int64_t CHANNELS = 2 * LANES;  // numbers of a register
constexpr int KEYS = 8;                  // of a tile of scores; EDGE is a multiple

GAUGEKIT_BF16_INLINE __mmask32 first_columns(int64_t count) {
  return count >= CHANNELS ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
}

// Scores of `queries` rows of words q [·, stride] beside keys of `channels` numbers; row m's stand at
// scores + m·EDGE. Meanwhile the rows of the next block are fetched, without which it takes half as long
// again.
struct PairScores {
  const Words* q;
  int64_t stride, queries, channels;
  const BFloat16* const* keys;  // EDGE, any valid ones from `count` on
  int64_t count;
  float* scores;
  const char* const* next;
};

template <int MR>
GAUGEKIT_BF16_INLINE void score_step(__m512 (&sum)[MR][KEYS], const PairScores& f, int64_t m, int64_t n,
                                     int64_t c, __mmask32 mask) {
  __m512bh left[MR];
#pragma GCC unroll 3
  for (int i = 0; i < MR; ++i) left[i] = as_pairs(_mm512_load_si512(f.q + (m + i) * f.stride + c / 2));
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j) {
    const __m512bh right = as_pairs(_mm512_maskz_loadu_epi16(mask, f.keys[n + j] + c));
#pragma GCC unroll 3
    for (int i = 0; i < MR; ++i) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left[i], right);
  }
}

// Lane j: the sum of x[j]'s lanes.
GAUGEKIT_BF16_INLINE __m256 total_of_each(__m512 (&x)[KEYS]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    x[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 4], 0xee));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    x[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 2], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 2], 0xdd));
  const __m512 mixed =
      _mm512_add_ps(_mm512_shuffle_ps(x[0], x[1], 0x44), _mm512_shuffle_ps(x[0], x[1], 0xee));
  const __m512 sums = _mm512_add_ps(mixed, _mm512_permute_ps(mixed, 0xb1));
  // A quarter has the sums q and q + 1, twice each, and the quarters have q = 0, 4, 2 and 6.
  const __m512i order = _mm512_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14, 0, 2, 8, 10, 4, 6, 12, 14);
  return _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums));
}

template <int MR>
GAUGEKIT_BF16_INLINE void score_tile(const PairScores& f, int64_t m, int64_t n) {
  __m512 sum[MR][KEYS];
#pragma GCC unroll 3
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) sum[i][j] = _mm512_setzero_ps();
  // The tiles of all queries share the next block's rows among them.
  const int64_t first = KEYS * m / f.queries, last = KEYS * (m + MR) / f.queries;
  int64_t c = 0;
  for (; c + CHANNELS <= f.channels; c += CHANNELS) {
    for (int64_t j = first; j < last; ++j) __builtin_prefetch(f.next[n + j] + c * sizeof(BFloat16), 0, 2);
    score_step(sum, f, m, n, c, ~__mmask32(0));
  }
  if (c < f.channels) score_step(sum, f, m, n, c, first_columns(f.channels - c));
#pragma GCC unroll 3
  for (int i = 0; i < MR; ++i) _mm256_storeu_ps(f.scores + (m + i) * EDGE + n, total_of_each(sum[i]));
}

GAUGEKIT_BF16 inline void score_pairs(const PairScores& f) {
  for (int64_t n = 0; n < f.count; n += KEYS) {  // they stay near for all queries
    int64_t m = 0;
    for (; m + 3 <= f.queries; m += 3) score_tile<3>(f, m, n);
    if (f.queries - m == 2) score_tile<2>(f, m, n);
    if (f.queries - m == 1) score_tile<1>(f, m, n);
  }
}

// to = keep · to + Σ p · (the columns of each row of the block), p words of neighbouring rows.
struct PairSum {
  const Words* p;
  float keep;
  float* to;
};

struct PairSums {
  const PairSum* sums;
  int64_t count;
  const BFloat16* const* values;  // two for each pair
  int64_t column, width, pairs;
};

// UNITS registers of columns from `at` on, of which the last may be cut.
template <int MR, int UNITS>
GAUGEKIT_BF16_INLINE void pair_sums_tile(const PairSums& f, const PairSum* of, int64_t at, __mmask32 mask) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Columns of two rows side by side: the first sixteen, and those after them.
  const __m512i low =
      _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(CHANNELS)), 16));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
  const __mmask16 halves[2] = {static_cast<__mmask16>(mask), static_cast<__mmask16>(mask >> LANES)};
  __m512 sum[MR][2 * UNITS];
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < 2 * UNITS; ++u)
      sum[m][u] = _mm512_mul_ps(_mm512_set1_ps(of[m].keep),
                                _mm512_maskz_loadu_ps(halves[u % 2], of[m].to + at + u * LANES));
  for (int64_t p = 0; p < f.pairs; ++p) {
    const BFloat16 *upper = f.values[2 * p] + f.column + at, *lower = f.values[2 * p + 1] + f.column + at;
    __m512bh right[2 * UNITS];
#pragma GCC unroll 4
    for (int u = 0; u < UNITS; ++u) {
      const __m512i a = _mm512_maskz_loadu_epi16(mask, upper + u * CHANNELS);
      const __m512i b = _mm512_maskz_loadu_epi16(mask, lower + u * CHANNELS);
      right[2 * u] = as_pairs(_mm512_permutex2var_epi16(a, low, b));
      right[2 * u + 1] = as_pairs(_mm512_permutex2var_epi16(a, high, b));
    }
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      const __m512bh left = as_pairs(_mm512_set1_epi32(static_cast<int>(of[m].p[p])));
#pragma GCC unroll 8
      for (int u = 0; u < 2 * UNITS; ++u) sum[m][u] = _mm512_dpbf16_ps(sum[m][u], left, right[u]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < 2 * UNITS; ++u)
      _mm512_mask_storeu_ps(of[m].to + at + u * LANES, halves[u % 2], sum[m][u]);
}

template <int MR, int UNITS>
GAUGEKIT_BF16_INLINE void pair_sums_columns(const PairSums& f, const PairSum* of, int64_t at) {
  for (; at + UNITS * CHANNELS <= f.width; at += UNITS * CHANNELS)
    pair_sums_tile<MR, UNITS>(f, of, at, ~__mmask32(0));
  if constexpr (UNITS > 1)
    pair_sums_columns<MR, UNITS / 2>(f, of, at);
  else if (at < f.width)
    pair_sums_tile<MR, 1>(f, of, at, first_columns(f.width - at));
}

GAUGEKIT_BF16 inline void add_weighted_pairs(const PairSums& f) {
  const PairSum *of = f.sums, *end = of + f.count;
  for (; of + 12 <= end; of += 12) pair_sums_columns<12, 1>(f, of, 0);
  for (; of + 4 <= end; of += 4) pair_sums_columns<4, 2>(f, of, 0);
  for (; of + 2 <= end; of += 2) pair_sums_columns<2, 4>(f, of, 0);
  if (of < end) pair_sums_columns<1, 4>(f, of, 0);
}

GAUGEKIT_BF16_INLINE __m512 widened(const BFloat16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

GAUGEKIT_BF16_INLINE void round_to(BFloat16* to, __m512 x, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// A key RoPE(gain ⊙ v), rounded: the pair (i, i + half) turns by cos[i] and sin[i], for i < pairs. gain null:
// 1.
struct PairTurn {
  const BFloat16* value;
  BFloat16* key;
  int64_t half, pairs;
  const float *gain, *cos, *sin;
};

GAUGEKIT_BF16 inline void turn_key(const PairTurn& f) {
  for (int64_t i = 0; i < f.half; i += LANES) {
    const auto mask = static_cast<__mmask16>(first_columns(std::min(f.half - i, LANES)));
    const auto turning = static_cast<__mmask16>(first_columns(std::clamp<int64_t>(f.pairs - i, 0, LANES)));
    __m512 x = widened(f.value + i, mask), y = widened(f.value + f.half + i, mask);
    if (f.gain) {
      x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, f.gain + i));
      y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, f.gain + f.half + i));
    }
    const __m512 cos = _mm512_maskz_loadu_ps(turning, f.cos + i),
                 sin = _mm512_maskz_loadu_ps(turning, f.sin + i);
    round_to(f.key + i, _mm512_mask_mov_ps(x, turning, _mm512_fmsub_ps(x, cos, _mm512_mul_ps(y, sin))), mask);
    round_to(f.key + f.half + i,
             _mm512_mask_mov_ps(y, turning, _mm512_fmadd_ps(y, cos, _mm512_mul_ps(x, sin))), mask);
  }
}

struct PairSplitScratch : SplitRows<float> {
  Buffer<Words> q, weights;
  Buffer<BFloat16> keys;
  std::vector<const BFloat16*> value_rows, key_rows;
  std::vector<PairSum> sums;
  explicit PairSplitScratch(ScratchSizes s)
      : SplitRows(s),
        q(s.rows * padded<Words>(pairs_of(s.width))),
        weights(squares * EDGE * PAIRS),
        keys(s.keys),
        value_rows(EDGE),
        key_rows(EDGE) {}
};

// A split's blocks as pairs.
struct PairBlocks {
  using Split = CacheSplit<BFloat16>;
  using Scratch = PairSplitScratch;

  static int64_t stride(const Split& f) { return padded<Words>(pairs_of(f.shape.width)); }

  static void read_queries(const Split& f, const Queries& of, Scratch& x) {
    for (int64_t h = 0; h < f.repeats(); ++h)
      pair_columns(
          {f.q.at(of.batch, of.group * f.repeats() + h, of.first), f.q.stride.row, of.count, f.shape.width},
          x.q.data() + h * of.count * stride(f), stride(f));
  }

  static void read_block(const Split& f, const Queries& of, int64_t first, int64_t count, Scratch& x) {
    fetch_rows(f, of, first, count, x);
    const int64_t width = padded<float>(f.shape.width);
    const Span seen = f.seen_in(of, first, count);
    for (int64_t j = 0; j < EDGE; ++j) {
      const int64_t row = seen.nearest(j), at = (first + row) * f.pairs;
      x.value_rows[j] = x.key_rows[j] = f.row(of, first + row);
      if (!f.cos) continue;
      x.key_rows[j] = x.keys.data() + row * width;
      if (j == row)
        turn_key({x.value_rows[j], x.keys.data() + row * width, f.shape.width / 2, f.pairs,
                  f.key_gain.empty() ? nullptr : f.key_gain.data(), f.cos + at, f.sin + at});
    }
  }

  static void weigh_block(const Split& f, const Queries& of, const Part& part, int64_t first, int64_t count,
                          Scratch& x) {
    score_pairs({x.q.data(), stride(f), part.rows, f.shape.width, x.key_rows.data(), count, x.p.data(),
                 x.next.data()});
    const bool masked = see_rows(of, part, first, count, x);
    for (int64_t r = 0; r < part.rows + part.means; r += EDGE)
      weigh_pairs(
          {x.square(part, r, masked), static_cast<float>(f.scale * LOG2_E), x.weights.data() + r * PAIRS});
  }

  static void add_block(const Split& f, const Queries& of, const Part& part, int64_t count, float* to,
                        Scratch& x) {
    const auto sums = [&](int64_t row, int64_t rows, float* sums_to, int64_t step) {
      for (int64_t r = 0; r < rows; ++r)
        x.sums.push_back({x.weights.data() + (row + r) * PAIRS, x.keep[row + r], sums_to + r * step});
    };
    const auto add = [&](int64_t column, int64_t width) {
      add_weighted_pairs(
          {x.sums.data(), int64_t(x.sums.size()), x.value_rows.data(), column, width, (count + 1) / 2});
      x.sums.clear();
    };
    for (int64_t h = 0; h < (f.slices() ? f.repeats() : 1); ++h) {
      const int64_t column = h * f.width, rows = f.slices() ? of.count : part.rows;
      sums(h * of.count, rows, to + h * of.count * part.wide, part.wide);
      sums(part.rows, part.means, to + part.mean() + column, part.whole);
      add(column, f.width);
    }
  }
};

}  // namespace gaugekit
#endif
