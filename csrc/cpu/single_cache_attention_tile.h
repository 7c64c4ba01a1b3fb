// The vector work of attention from one cache, on one block of at most EDGE rows of the cache: the scores of
// all query rows beside it, sums of its rows weighted by them, keys turned by their position, and the last
// step, which adds up the parts of a sequence. The softmax between is ragged_attention's. Free of torch.
//
// Every score is one chain of additions along the channels and every sum one along the rows of the cache,
// whatever tile computes it: a query's bits depend neither on the others beside it nor on the threads.
#pragma once

#include "cpu/ragged_attention_tile.h"

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

namespace gaugekit {

constexpr int64_t LINE = 64;  // bytes of a cache line

// Scores of `queries` rows of q [·, width], dense, beside `count` keys of `width` numbers, a multiple of a
// register. Row m's stand in square m / EDGE of p, [EDGE, EDGE] each. Meanwhile the block after this one is
// fetched: EDGE rows of `bytes` each, all the products leave the memory idle for.
template <class A>
struct Scores {
  const A* q;
  int64_t queries, width;
  const A* const* keys;  // EDGE, any valid ones from `count` on
  int64_t count;
  A* p;
  const char* const* next;
  int64_t bytes;
};

template <int W, int MR, int NR, class A>
GAUGEKIT_INLINE void scores_tile(const Scores<A>& f, int64_t m, int64_t n) {
  Vector<A, W> sum[MR][NR] = {};
  const A *q[MR], *key[NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) q[i] = f.q + (m + i) * f.width;
#pragma GCC unroll 12
  for (int j = 0; j < NR; ++j) key[j] = f.keys[n + j];
  // This tile's share of the next block: of each of NR rows the bytes that fall to MR queries. Where that is
  // about a line for as many channels as fill one, they take turns; else each row's share is asked for at
  // once.
  constexpr int64_t UNIT = LINE / sizeof(A);
  const int64_t units = f.width / UNIT, share = f.bytes * (m + MR) / f.queries - f.bytes * m / f.queries;
  const int64_t step = (share * NR + units - 1) / units;
  const bool spread = step <= LINE && 2 * step >= LINE;
  int64_t c = 0;
  for (int s = 0; s < NR; ++s) {
    const char* at = f.next[n + s] + f.bytes * m / f.queries;
    if (!spread)
      for (const char* end = at + share; at < end; at += LINE) __builtin_prefetch(at, 0, 2);
    for (const int64_t last = units * (s + 1) / NR * UNIT; c < last;) {
      if (spread) __builtin_prefetch(at, 0, 2), at += step;
#pragma GCC unroll 4
      for (int u = 0; u < UNIT / W; ++u, c += W) {
        Vector<A, W> left[MR];
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) left[i] = load<W>(q[i] + c, W);
#pragma GCC unroll 12
        for (int j = 0; j < NR; ++j) {
          const Vector<A, W> right = load<W>(key[j] + c, W);
#pragma GCC unroll 4
          for (int i = 0; i < MR; ++i) sum[i][j] += left[i] * right;
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    A* to = f.p + (m + i) / EDGE * EDGE * EDGE + (m + i) % EDGE * EDGE + n;
#pragma GCC unroll 12
    for (int j = 0; j < NR; ++j) to[j] = total<W, A>(sum[i][j]);
  }
}

template <int W, int MR, class A>
GAUGEKIT_INLINE int64_t scores_rows(const Scores<A>& f, int64_t m, int64_t n, int64_t keys) {
  constexpr int SUMS = W * sizeof(A) == ALIGN ? 24 : 12;                  // held in registers
  constexpr int FIT = SUMS / MR, NR = FIT >= 12 ? 12 : FIT >= 6 ? 6 : 4;  // divides twelve
  for (; m + MR <= f.queries; m += MR)
    for (int64_t j = n; j < n + keys; j += NR) {
      scores_tile<W, MR, NR>(f, m, j);
    }
  return m;
}

template <class A, int W>
GAUGEKIT_INLINE void scores_body(const Scores<A>& given) {
  const Scores<A> f = given;
  constexpr int MOST = W * sizeof(A) == ALIGN ? 4 : 3;
  for (int64_t n = 0; n < f.count; n += 12) {  // twelve keys stay near for all queries
    int64_t m = scores_rows<W, MOST>(f, 0, n, 12);
    if (MOST == 4) m = scores_rows<W, 3>(f, m, n, 12);
    m = scores_rows<W, 2>(f, m, n, 12);
    scores_rows<W, 1>(f, m, n, 12);
  }
}

GAUGEKIT_BLOCK_KERNEL(score, scores_body, Scores)

// to[r] = keep[r] · to[r] + Σ_j p[r, j] · (width columns of row j of the block), for `rows` rows, `step`
// apart, and `count` rows of the block. p [·, EDGE]; width a multiple of ALIGN bytes.
template <class A>
struct WeightedSums {
  const A *p, *keep;
  int64_t rows;
  const A* const* values;
  int64_t column, width, count;
  A* to;
  int64_t step;
};

template <int W, int MR, int NV, class A>
GAUGEKIT_INLINE void sums_tile(const WeightedSums<A>& f, int64_t row, int64_t column) {
  Vector<A, W> sum[MR][NV];
  const A* p = f.p + row * EDGE;
  A* to = f.to + row * f.step + column;
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[i][v] = f.keep[row + i] * load<W>(to + i * f.step + v * W, W);
  for (int64_t j = 0; j < f.count; ++j) {
    const A* from = f.values[j] + f.column + column;
    Vector<A, W> right[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) right[v] = load<W>(from + v * W, W);
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[i][v] += p[i * EDGE + j] * right[v];
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<W>(to + i * f.step + v * W, sum[i][v], W);
}

template <int W, int MR, int NV, class A>
GAUGEKIT_INLINE void sums_columns(const WeightedSums<A>& f, int64_t row, int64_t column) {
  for (; column + NV * W <= f.width; column += NV * W) sums_tile<W, MR, NV>(f, row, column);
  if constexpr (NV > 1) sums_columns<W, MR, NV / 2>(f, row, column);
}

template <class A, int W>
GAUGEKIT_INLINE void sums_body(const WeightedSums<A>& given) {
  const WeightedSums<A> f = given;
  int64_t row = 0;
  for (; row + 4 <= f.rows; row += 4) sums_columns<W, 4, W * sizeof(A) == ALIGN ? 4 : 2>(f, row, 0);
  for (; row + 2 <= f.rows; row += 2) sums_columns<W, 2, 4>(f, row, 0);
  if (row < f.rows) sums_columns<W, 1, 8>(f, row, 0);
}

GAUGEKIT_BLOCK_KERNEL(add_weighted, sums_body, WeightedSums)

// Rows of keys RoPE(gain ⊙ v), both `stride` apart: of row j the pair (i, i + half) turns by cos[j, i] and
// sin[j, i], for i < pairs. gain null: 1.
template <class A>
struct Turning {
  const A* values;
  A* keys;
  int64_t stride, half, pairs, rows;
  const A *gain, *cos, *sin;
  int64_t cos_row, sin_row;
};

template <class A, int W>
GAUGEKIT_INLINE void turning_body(const Turning<A>& given) {
  const Turning<A> f = given;
  const Vector<A, W> one = splat<A, W>(A(1));
  for (int64_t j = 0; j < f.rows; ++j) {
    const A *v = f.values + j * f.stride, *cos = f.cos + j * f.cos_row, *sin = f.sin + j * f.sin_row;
    A* k = f.keys + j * f.stride;
    columns<W>(
        f.half, GAUGEKIT_STEP {
          const auto gained = [&](int64_t at) __attribute__((always_inline)) {
            return load<W>(v + at, count) * (f.gain ? load<W>(f.gain + at, count) : one);
          };
          const Vector<A, W> x = gained(i), y = gained(f.half + i);
          store<W>(k + i, x, count), store<W>(k + f.half + i, y, count);
        });
    columns<W>(
        f.pairs, GAUGEKIT_STEP {
          const Vector<A, W> x = load<W>(k + i, count), y = load<W>(k + f.half + i, count);
          const Vector<A, W> c = load<W>(cos + i, count), s = load<W>(sin + i, count);
          store<W>(k + i, x * c - y * s, count), store<W>(k + f.half + i, y * c + x * s, count);
        });
  }
}

GAUGEKIT_BLOCK_KERNEL(turn_keys, turning_body, Turning)

// to[i] += Σ_s weight[s] · (width numbers of part s), parts `step` apart, in their order.
template <class A>
struct Parts {
  const A* from;
  int64_t step, count;
  const A* weight;
  A* to;
  int64_t width;
};

template <class A, int W>
GAUGEKIT_INLINE void parts_body(const Parts<A>& given) {
  const Parts<A> f = given;
  for (int64_t i = 0; i < f.width; i += W) {
    Vector<A, W> sum = load<W>(f.to + i, W);
    for (int64_t s = 0; s < f.count; ++s) sum += f.weight[s] * load<W>(f.from + s * f.step + i, W);
    store<W>(f.to + i, sum, W);
  }
}

GAUGEKIT_BLOCK_KERNEL(add_parts_of, parts_body, Parts)

}  // namespace gaugekit

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
