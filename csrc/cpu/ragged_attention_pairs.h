// The vector work of ragged attention in bfloat16 on processors that multiply pairs of bfloat16 numbers by
// themselves (AVX512-BF16): what ragged_attention_tile.h does on one block of EDGE queries beside EDGE keys,
// with every factor a bfloat16 number and every sum a float. Free of torch.
//
// A word is a pair of numbers that are multiplied with another pair and added to one sum (vdpbf16ps, to which
// subnormal numbers are zero). Pairs run along the axis that is summed, so a matrix is held as words of
// neighbouring columns (`pair_columns`), as those turned (`turn_pairs`), or as words of neighbouring rows
// (`pair_rows`), whichever product reads it.
#pragma once

#include "cpu/ragged_attention_tile.h"

#ifdef GAUGEKIT_X86
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header reads an undefined register in intrinsics that set every lane.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

namespace gaugekit {

using Words = uint32_t;

constexpr int64_t LANES = ALIGN / sizeof(float);
constexpr int64_t PAIRS = EDGE / 2;  // of a block's queries or keys

inline int64_t pairs_of(int64_t columns) { return (columns + 1) / 2; }

GAUGEKIT_BF16_INLINE __m512bh as_pairs(__m512i words) { return reinterpret_cast<__m512bh>(words); }
GAUGEKIT_BF16_INLINE __m512i as_words(__m512bh pairs) { return reinterpret_cast<__m512i>(pairs); }

// The first `count` of 32 columns from `from` on, zeros behind them.
GAUGEKIT_BF16_INLINE __m512i some_columns(const BFloat16* from, int64_t count) {
  return count >= 2 * LANES ? _mm512_loadu_si512(from)
         : count > 0        ? _mm512_maskz_loadu_epi16((uint32_t(1) << count) - 1, from)
                            : _mm512_setzero_si512();
}

// Rows of bfloat16 numbers, `step` apart.
struct PairSource {
  const BFloat16* from;
  int64_t step, rows, columns;
};

// To words [rows, stride] of neighbouring columns; stride a multiple of LANES.
GAUGEKIT_BF16 inline void pair_columns(const PairSource& f, Words* to, int64_t stride) {
  for (int64_t r = 0; r < f.rows; ++r)
    for (int64_t i = 0; i < stride; i += LANES)
      _mm512_store_si512(to + r * stride + i, some_columns(f.from + r * f.step + 2 * i, f.columns - 2 * i));
}

// The transpose of a square of words.
GAUGEKIT_BF16_INLINE void transpose(__m512i (&x)[LANES]) {
  __m512i y[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // Row i now has column i, i + 4, i + 8 and i + 12 of four rows each.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

// To words [pairs, EDGE] of neighbouring columns, a row of them for each pair; rows from f.rows on are zeros.
GAUGEKIT_BF16 inline void turn_pairs(const PairSource& f, Words* to) {
  const int64_t pairs = pairs_of(f.columns);
  for (int64_t row = 0; row < EDGE; row += LANES)
    for (int64_t i = 0; i < pairs; i += LANES) {
      __m512i square[LANES];
      for (int64_t r = 0; r < LANES; ++r)
        square[r] =
            some_columns(f.from + (row + r) * f.step + 2 * i, row + r < f.rows ? f.columns - 2 * i : 0);
      transpose(square);
      for (int64_t p = 0; p < std::min(LANES, pairs - i); ++p)
        _mm512_store_si512(to + (i + p) * EDGE + row, square[p]);
    }
}

// To words [pairs of `rows` rows, stride] of neighbouring rows; stride a multiple of LANES. Rows from f.rows
// on are zeros.
GAUGEKIT_BF16 inline void pair_rows(const PairSource& f, Words* to, int64_t stride, int64_t rows) {
  for (int64_t r = 0; r < rows; r += 2, to += stride)
    for (int64_t i = 0; i < stride; i += LANES) {
      __m512i row[2];
      for (int half = 0; half < 2; ++half) {
        const int64_t count = r + half < f.rows ? std::clamp<int64_t>(f.columns - i, 0, LANES) : 0;
        row[half] = _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16((uint32_t(1) << count) - 1, f.from + (r + half) * f.step + i));
      }
      _mm512_store_si512(to + i, _mm512_or_si512(row[0], _mm512_slli_epi32(row[1], 16)));
    }
}

// A[r, p] and B [depth, width] are words: pairs of the summed axis.
using PairProduct = Product<float, Words>;

template <int MR, int NV>
GAUGEKIT_BF16_INLINE void pair_tile(const PairProduct& f, int64_t column, int64_t row) {
  __m512 sum[MR][NV];
  const Words *a = f.a + row * f.a_row, *b = f.b + column;
  const int64_t a_row = f.a_row, a_step = f.a_step, width = f.width;
  float* c = f.c + row * width + column;
#pragma GCC unroll 24
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n)
      sum[m][n] =
          f.keep ? _mm512_mul_ps(_mm512_set1_ps(f.keep[row + m]), _mm512_load_ps(c + m * width + n * LANES))
                 : _mm512_setzero_ps();
  for (int64_t p = f.depth; p > 0; --p, b += width, a += a_step) {
    __m512bh right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = as_pairs(_mm512_load_si512(b + n * LANES));
#pragma GCC unroll 24
    for (int m = 0; m < MR; ++m) {
      const __m512bh left = as_pairs(_mm512_set1_epi32(static_cast<int>(a[m * a_row])));
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left, right[n]);
    }
  }
#pragma GCC unroll 24
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) _mm512_store_ps(c + m * width + n * LANES, sum[m][n]);
}

template <int NV>
GAUGEKIT_BF16_INLINE void pair_tiles(const PairProduct& f, int64_t column) {
  constexpr int MR = 24 / NV > 12 ? 12 : 24 / NV;
  for (int64_t row = 0; row < f.rows; row += MR) pair_tile<MR, NV>(f, column, row);
}

GAUGEKIT_BF16 inline void multiply_pairs(const PairProduct& f) {
  int64_t column = 0;
  for (; column + 4 * LANES <= f.width; column += 4 * LANES) pair_tiles<4>(f, column);
  const int64_t left = (f.width - column) / LANES;
  if (left == 3) return pair_tiles<3>(f, column);
  if (left == 2) return pair_tiles<2>(f, column);
  if (left == 1) pair_tiles<1>(f, column);
}

// 2^x to 2 parts in 10^7, 0 far below the normal numbers.
GAUGEKIT_BF16_INLINE __m512 two_to_the(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 sum = _mm512_set1_ps(1.788368742e-3f);  // (2^r - 1) / r, interpolated at Chebyshev's nodes of [0, 1]
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(9.1993876e-3f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(5.565705439e-2f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.2402071942f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.6931475676f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, x);  // by the whole number not above x
}

// Lane r: the largest number of x[r].
GAUGEKIT_BF16_INLINE __m512 largest_of_each(__m512 (&x)[LANES]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    x[i] =
        _mm512_max_ps(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    x[i] =
        _mm512_max_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd));
  for (int i = 0; i < 2; ++i)
    x[i] = _mm512_max_ps(_mm512_shuffle_ps(x[i], x[i + 2], 0x44), _mm512_shuffle_ps(x[i], x[i + 2], 0xee));
  const __m512 mixed =
      _mm512_max_ps(_mm512_shuffle_ps(x[0], x[1], 0x88), _mm512_shuffle_ps(x[0], x[1], 0xdd));
  // A quarter has the rows q + 0, q + 2, q + 1 and q + 3, and the quarters have q = 0, 8, 4 and 12.
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15),
                               mixed);
}

// Lanes [first, last) of those that stand for the columns from `at` on.
GAUGEKIT_BF16_INLINE __mmask16 seen(int64_t at, float first, float last) {
  const auto below = [&](float edge) {
    return (uint32_t(1) << std::clamp<int64_t>(static_cast<int64_t>(edge) - at, 0, LANES)) - 1;
  };
  return static_cast<__mmask16>(below(last) & ~below(first));
}

// Weights of scores that are not scaled yet; the softmax's numerators become words p [EDGE, PAIRS] of
// neighbouring keys.
struct PairWeights {
  Weights<float> of;
  float scale;
  Words* p;
};

GAUGEKIT_BF16 inline void weigh_pairs(const PairWeights& given) {
  const Weights<float> f = given.of;
  const __m512 scale = _mm512_set1_ps(given.scale);
  constexpr int COUNT = EDGE / LANES;
  for (int64_t row = 0; row < f.rows; row += LANES) {
    __m512 most[LANES];
    for (int64_t r = 0; r < LANES; ++r) {
      float* scores = f.p + (row + r) * EDGE;
      __m512 x[COUNT];
#pragma GCC unroll 3
      for (int i = 0; i < COUNT; ++i) {
        x[i] = _mm512_mul_ps(scale, _mm512_load_ps(scores + i * LANES));
        if (f.masked)
          x[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()),
                                    seen(i * LANES, f.first[row + r], f.last[row + r]), x[i]);
        _mm512_store_ps(scores + i * LANES, x[i]);
      }
      most[r] = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), x[2]);
    }
    const __m512 before = _mm512_load_ps(f.top + row), top = _mm512_max_ps(before, largest_of_each(most));
    _mm512_store_ps(f.top + row, top);
    _mm512_store_ps(f.keep + row, two_to_the(_mm512_sub_ps(before, top)));
    for (int64_t r = row; r < std::min(row + LANES, f.rows); ++r) {
      const __m512 shift = _mm512_set1_ps(f.top[r]);
      __m512 x[COUNT], sum = _mm512_mul_ps(_mm512_set1_ps(f.keep[r]), _mm512_load_ps(f.sum + r * LANES));
#pragma GCC unroll 3
      for (int i = 0; i < COUNT; ++i) {
        x[i] = two_to_the(_mm512_sub_ps(_mm512_load_ps(f.p + r * EDGE + i * LANES), shift));
        sum = _mm512_add_ps(sum, x[i]);
      }
      _mm512_store_ps(f.sum + r * LANES, sum);
      Words* to = given.p + r * PAIRS;
      _mm512_storeu_si512(to, as_words(_mm512_cvtne2ps_pbh(x[1], x[0])));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + LANES),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x[2])));
    }
  }
}

}  // namespace gaugekit
#endif
