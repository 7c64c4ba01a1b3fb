// What the forward and the backward sweep of shaped_combine share: sequences, what sees what, running sums.
//
// C V is the mean of the value rows a query sees. Queries are visited in order, so the rows seen are a window
// whose ends only move forward: one running sum a column is enough. The sum is kept as `rounded + recent`: at
// most FLUSH rows are added in the accumulator type before they go into a double, so its error does not grow
// with the length. Under a window, where a row that leaves is subtracted, rows go into the double at once:
// nothing would wash out the rounding.
//
// A sequence is cut into chunks of fixed length, and every sum is that of the chunks before plus that of the
// rows since: the same additions in the same order whether one thread walks all chunks or each has its own
// thread, so the number of threads never changes a bit. A window's sum is taken anew at each chunk.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/simd.h"

namespace gaugekit {

constexpr int64_t FLUSH = 32;
constexpr int64_t CHUNK = 128;  // rows; a multiple of FLUSH

// One sequence: its queries, its real keys, the position of its first query among them, and the number of
// chunks in all sequences before it.
struct Sequence {
  int64_t batch, first_query, queries, first_key, keys, start, chunks_before;
};

// How far apart rows of a [B, heads, rows, V] array stand; the last axis is contiguous.
struct Strides {
  int64_t batch, head, row;
};

template <class S>
struct Rows {
  S* data = nullptr;
  Strides stride{};
  GAUGEKIT_INLINE S* at(int64_t batch, int64_t head, int64_t row) const {
    return data + batch * stride.batch + head * stride.head + row * stride.row;
  }
  explicit operator bool() const { return data != nullptr; }
};

// Gains of one head, absent ones at the value that leaves their term out, and which of them were given.
template <class A>
struct Gains {
  std::vector<A> alpha, beta, gamma, lambda;
  bool has_alpha = false, has_beta = false, has_gamma = false, has_lambda = false;
};

struct Shape {
  int64_t heads, groups, width;
  bool causal;
  int64_t window;  // 0: none
  int64_t heads_of_group() const { return heads / groups; }
  // Every query sees every key. Else a query's chunk is that of its position.
  bool open() const { return !causal && !window; }
  // The first rows of a chunk under a window are read once more, so it is long beside the window.
  int64_t chunk_rows() const { return window ? (4 * window + CHUNK - 1) / CHUNK * CHUNK : CHUNK; }
  int64_t chunks(const Sequence& s) const {
    const int64_t rows = open() ? std::max(s.keys, s.queries) : s.keys;
    return std::max<int64_t>(1, (rows + chunk_rows() - 1) / chunk_rows());
  }
};

struct Span {
  int64_t first, last;
  int64_t count() const { return last - first; }
  int64_t nearest(int64_t i) const { return std::clamp(i, first, last - 1); }
};

inline Span keys_of_chunk(const Shape& shape, const Sequence& s, int64_t chunk) {
  const int64_t first = std::min(chunk * shape.chunk_rows(), s.keys);
  return {first, std::min(first + shape.chunk_rows(), s.keys)};
}

// Queries before the first and after the last key belong to the first and the last chunk.
inline Span queries_of_chunk(const Shape& shape, const Sequence& s, int64_t chunk) {
  const int64_t last = shape.chunks(s), start = shape.open() ? 0 : s.start;
  const auto edge = [&](int64_t c) {
    if (c == 0 || c == last) return c ? s.queries : 0;
    return std::min(std::max<int64_t>(c * shape.chunk_rows() - start, 0), s.queries);
  };
  return {edge(chunk), edge(chunk + 1)};
}

// Keys that query t sees.
GAUGEKIT_INLINE Span keys_of(const Shape& shape, const Sequence& s, int64_t t) {
  const int64_t p = s.start + t;
  int64_t first = 0, last = s.keys;
  if (shape.causal) {
    if (p < 0 || p >= s.keys) return {0, 0};
    last = p + 1;
  }
  if (shape.window) {
    first = std::max<int64_t>(first, p - shape.window + 1);
    last = std::min(last, p + shape.window);
  }
  return first < last ? Span{first, last} : Span{0, 0};
}

// Queries that see key j; both ends never rise while j falls.
GAUGEKIT_INLINE Span queries_of(const Shape& shape, const Sequence& s, int64_t j) {
  int64_t first = 0, last = s.queries;
  if (shape.causal) {
    first = j - s.start;
    last = std::min(last, s.keys - s.start);
  } else if (shape.window) {
    first = j - shape.window + 1 - s.start;
  }
  if (shape.window) last = std::min(last, j + shape.window - s.start);
  const auto inside = [&](int64_t t) { return std::min(std::max<int64_t>(t, 0), s.queries); };
  return {inside(first), inside(last)};
}

// step(i, count) for W columns at a time, then for the tail: in the first form the count is a constant.
template <int W, class Step>
GAUGEKIT_INLINE void columns(int64_t width, const Step& step) {
  int64_t i = 0;
  for (; i + W <= width; i += W) step(i, W);
  if (i < width) step(i, width - i);
}
#define GAUGEKIT_STEP [&](int64_t i, int64_t count) __attribute__((always_inline))

// `name`_called is the row function `name` by itself, compiled for the instruction set that W accumulators to
// a register stand for: what a sweep calls outside its plainest case, so that it stays small.
#ifdef GAUGEKIT_X86
#define GAUGEKIT_ROW(name)                                                                      \
  GAUGEKIT_EACH_ISA((int W, class A, class S, class... P), name, (P... p), name<W, A, S>(p...)) \
  template <int W, class A, class S, class... P>                                                \
  GAUGEKIT_INLINE void name##_called(P... p) {                                                  \
    if constexpr (W * sizeof(A) == 64)                                                          \
      name##_avx512<W, A, S>(p...);                                                             \
    else if constexpr (W * sizeof(A) == 32)                                                     \
      name##_avx2<W, A, S>(p...);                                                               \
    else                                                                                        \
      name##_portable<W, A, S>(p...);                                                           \
  }
#else
#define GAUGEKIT_ROW(name)                       \
  template <int W, class A, class S, class... P> \
  GAUGEKIT_NOINLINE void name##_called(P... p) { \
    name<W, A, S>(p...);                         \
  }
#endif

// recent += scale * row
template <int W, class A, class S>
GAUGEKIT_INLINE void accumulate(A* recent, const S* row, A scale, int64_t width) {
  columns<W>(
      width, GAUGEKIT_STEP {
        store<W>(recent + i, load<W>(recent + i, count) + scale * load<W>(row + i, count), count);
      });
}

// total += scale * row, and rounded to it
template <int W, class A, class S>
GAUGEKIT_INLINE void accumulate_exactly(double* total, A* rounded, const S* row, A scale, int64_t width) {
  columns<W>(
      width, GAUGEKIT_STEP {
        const Vector<A, W> term = scale * load<W>(row + i, count);
        const Vector<double, W> sum =
            load<W>(total + i, count) + __builtin_convertvector(term, Vector<double, W>);
        store<W>(total + i, sum, count);
        store<W>(rounded + i, __builtin_convertvector(sum, Vector<A, W>), count);
      });
}

// total += recent, rounded = base + total, recent = 0
template <int W, class A, class S>
GAUGEKIT_INLINE void settle(S* recent, A* rounded, double* total, const double* base, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    total[i] += recent[i];
    rounded[i] = static_cast<A>(base[i] + total[i]);
    recent[i] = 0;
  }
}

GAUGEKIT_ROW(accumulate)
GAUGEKIT_ROW(accumulate_exactly)
GAUGEKIT_ROW(settle)

// Running sums of a row of columns: `base` of the chunks before, `total + recent` of this one.
template <class A, int W>
struct RunningSum {
  RunningSum(int64_t columns, bool window)
      : recent(columns), rounded(columns), total(columns), base(columns), window(window) {}

  template <class S>
  GAUGEKIT_INLINE void add(int64_t column, const S* row, A scale, int64_t width) {
    if (window)
      accumulate_exactly_called<W, A, S>(&total[column], &rounded[column], row, scale, width);
    else
      accumulate_called<W, A, S>(&recent[column], row, scale, width);
  }

  // After each row, all its columns added.
  GAUGEKIT_INLINE void row_done() {
    if (!window && ++rows % FLUSH == 0) flush();
  }

  GAUGEKIT_INLINE void flush() {
    settle_called<W, A, A>(recent.data(), rounded.data(), total.data(), base.data(),
                           static_cast<int64_t>(total.size()));
  }

  // A new chunk, whose base is given or what was summed so far; under a window nothing.
  GAUGEKIT_NOINLINE void next_chunk(const double* given) {
    if (!window) flush();
    for (size_t i = 0; i < total.size(); ++i) {
      base[i] = window ? 0 : given ? given[i] : base[i] + total[i];
      rounded[i] = static_cast<A>(base[i]);
      total[i] = 0;
    }
    rows = 0;
  }

  std::vector<A> recent, rounded;
  std::vector<double> total, base;
  bool window;
  int64_t rows = 0;
};

// A kernel over chunks and units of work, for the four storage types.
#define GAUGEKIT_SWEEP(name, body, Problem)                                                      \
  GAUGEKIT_KERNEL(name, body, (const Problem<S>& f, const Sequence& s, Span chunks, Span units), \
                  (f, s, chunks, units))                                                         \
  template void name(const Problem<float>&, const Sequence&, Span, Span);                        \
  template void name(const Problem<double>&, const Sequence&, Span, Span);                       \
  template void name(const Problem<BFloat16>&, const Sequence&, Span, Span);                     \
  template void name(const Problem<Float16>&, const Sequence&, Span, Span);

}  // namespace gaugekit
