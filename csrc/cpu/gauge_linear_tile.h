// One head of a projection whose gauge is fixed, y = x[·, own] + x[·, others] F (+ bias), by tiles of rows
// and columns that stay in registers. F is read where it lies, x through the list of inputs. Free of torch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/simd.h"

// Products are sums of many terms: one rounding a term, not two, and half the instructions.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

namespace gaugekit {

constexpr int64_t GAUGE_ROWS = 24;  // a multiple of every tile's rows
constexpr int64_t LINE_BYTES = 64;

// Rows of F that are fetched before they are needed. For many rows of x they come from the second-level
// cache, for few from memory, and sooner.
constexpr int64_t ahead(int rows) { return rows >= 4 ? 12 : 48; }

// So many products are added up one after another, then their sum to those before: one chain of all of them
// would round several times as coarsely.
constexpr int64_t SPAN = 128;

template <class S>
struct GaugeHead {
  const S* x;                          // [rows, inputs], rows x_row apart
  int64_t x_row, inputs, first, last;  // of the rows, those of this piece
  const S* free;                       // F [depth, width], dense
  int64_t depth, width;
  const int32_t *others, *own;  // [depth] and [width]: places among the inputs
  const S* bias;                // [width], or null
  S* out;                       // the head's columns, rows out_row apart
  int64_t out_row;
  const S* next;  // F of the piece after this one: fetched meanwhile
};

// A tile of MR rows by NV registers.
template <class S, int W, int MR, int NV>
struct GaugeTile {
  using A = accumulator<S>;
  using Sums = Vector<A, W>[MR][NV];

  const GaugeHead<S>& f;
  const A* const (&line)[MR];  // row m of x
  int64_t column;

  // The products of p from `begin` to `end`.
  GAUGEKIT_INLINE void multiply(int64_t begin, int64_t end, Sums& sums) const {
    Sums sum = {};  // in registers, unlike what is handed over
    const S* b = f.free + begin * f.width + column;
    for (int64_t p = begin; p < end; ++p, b += f.width) {
      const int64_t i = f.others[p];
#pragma GCC unroll 8
      for (int64_t at = 0; at < (MR >= 4 ? 1 : NV * W); at += LINE_BYTES / sizeof(S))
        __builtin_prefetch(b + ahead(MR) * f.width + at);
      Vector<A, W> right[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) right[n] = load<W>(b + n * W, W);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) sum[m][n] += line[m][i] * right[n];
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) sums[m][n] = sum[m][n];
  }

  // The head's own inputs and its bias: what the products are added to.
  GAUGEKIT_INLINE Vector<A, W> start(int m, int n) const {
    const int64_t first = column + n * W;
    Vector<A, W> own;
#pragma GCC unroll 16
    for (int lane = 0; lane < W; ++lane) own[lane] = line[m][f.own[first + lane]];
    return f.bias ? own + load<W>(f.bias + first, W) : own;
  }
};

// Columns [column, column + NV W) of MR rows.
template <int W, int MR, int NV, class S>
GAUGEKIT_INLINE void gauge_tile(const GaugeHead<S>& f, const accumulator<S>* const (&line)[MR], S* out,
                                int64_t column) {
  using Tile = GaugeTile<S, W, MR, NV>;
  const Tile tile{f, line, column};
  typename Tile::Sums before = {}, sum;  // of whole spans, in memory: the registers are full
  // What is written last is fetched first: stores that wait for their lines would hold up the next tile.
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) __builtin_prefetch(out + m * f.out_row + column, 1);
  int64_t begin = 0;
  for (; begin + SPAN < f.depth; begin += SPAN) {
    tile.multiply(begin, begin + SPAN, sum);
    for (int m = 0; m < MR; ++m)
      for (int n = 0; n < NV; ++n) before[m][n] += sum[m][n];
  }
  tile.multiply(begin, f.depth, sum);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      const auto all = before[m][n] + sum[m][n];
      store<W>(out + m * f.out_row + column + n * W, all + tile.start(m, n), W);
    }
}

// Every column from `column` on, in tiles of at most MOST registers' width; what is left singly.
template <int W, int MR, int MOST, class S>
GAUGEKIT_INLINE void gauge_columns(const GaugeHead<S>& f, const accumulator<S>* const (&line)[MR], S* out,
                                   int64_t column) {
  for (; column + MOST * W <= f.width; column += MOST * W) gauge_tile<W, MR, MOST>(f, line, out, column);
  if constexpr (MOST > 1) {
    gauge_columns<W, MR, MOST / 2>(f, line, out, column);
  } else if constexpr (W > 1) {
    gauge_columns<1, MR, 1>(f, line, out, column);
  }
}

// MR rows from `row` on. 16-bit rows are widened once for all columns.
template <int W, int MR, int MOST, class S>
GAUGEKIT_INLINE void gauge_rows(const GaugeHead<S>& f, int64_t row, accumulator<S>* wide) {
  using A = accumulator<S>;
  const A* line[MR];
  for (int m = 0; m < MR; ++m) {
    const S* from = f.x + (row + m) * f.x_row;
    if constexpr (std::is_same_v<A, S>) {
      line[m] = from;
    } else {
      A* to = wide + m * f.inputs;
      for (int64_t i = 0; i < f.inputs; i += W) {
        const int64_t count = std::min<int64_t>(W, f.inputs - i);
        store<W>(to + i, load<W>(from + i, count), count);
      }
      line[m] = to;
    }
  }
  gauge_columns<W, MR, MOST>(f, line, f.out + row * f.out_row, 0);
}

// A share of the next piece's F, of as many as there are tiles of rows: it has not been read yet, and the
// products leave the memory idle.
template <int MR, class S>
GAUGEKIT_INLINE void fetch_next(const GaugeHead<S>& f, int64_t row) {
  const int64_t size = f.depth * f.width, tiles = (f.last - f.first) / MR;
  const int64_t share = (size + tiles - 1) / tiles, begin = (row - f.first) / MR * share;
  for (int64_t at = begin; at < std::min(begin + share, size); at += LINE_BYTES / sizeof(S))
    __builtin_prefetch(f.next + at, 0, 2);
}

// `wide`: room for eight rows of inputs, where they have 16 bits.
template <class S, int W>
GAUGEKIT_INLINE void gauge_head_body(const GaugeHead<S>& given, accumulator<S>* wide) {
  const GaugeHead<S> f = given;
  constexpr int BYTES = W * sizeof(accumulator<S>), MR = BYTES == 64 ? 8 : BYTES == 32 ? 6 : 4;
  int64_t row = f.first;
  for (; row + MR <= f.last; row += MR) {
    if (f.next) fetch_next<MR>(f, row);
    gauge_rows<W, MR, 2>(f, row, wide);
  }
  for (; row + 4 <= f.last; row += 4) gauge_rows<W, 4, 2>(f, row, wide);
  for (; row + 2 <= f.last; row += 2) gauge_rows<W, 2, 4>(f, row, wide);
  if (row < f.last) gauge_rows<W, 1, 8>(f, row, wide);
}

GAUGEKIT_KERNEL(gauge_head, gauge_head_body, (const GaugeHead<S>& f, accumulator<S>* wide), (f, wide))

}  // namespace gaugekit

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
