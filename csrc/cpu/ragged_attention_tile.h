// The vector work of ragged attention on one block of EDGE queries beside EDGE keys: small matrix products,
// the softmax's exponentials, the slopes of the backward, and rows brought into and out of the accumulators'
// type. Everything is compiled for each instruction set (GAUGEKIT_BLOCK_KERNEL); who calls it is plain C++.
// Free of torch.
//
// EDGE is 48 because a tile of NV vectors beside TILE / NV rows then divides it for every NV: matrices
// between EDGE rows need no tails. Columns are padded with zeros to ALIGN bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/shaped_combine_rows.h"

// Products are sums of many terms: one rounding a term, not two, and half the instructions.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

namespace gaugekit {

#define GAUGEKIT_BLOCK_KERNEL(name, body, Problem) GAUGEKIT_KERNEL(name, body, (const Problem<S>& f), (f))

constexpr int64_t EDGE = 48;
constexpr int64_t ALIGN = 64;

template <class A>
constexpr int64_t padded(int64_t columns) {
  constexpr int64_t lanes = ALIGN / sizeof(A);
  return (columns + lanes - 1) / lanes * lanes;
}

// Zeros that start at a multiple of ALIGN bytes: a load of a whole register then never crosses a cache line.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size) : held_(size + ALIGN / sizeof(A)), size_(size) {
    const auto address = reinterpret_cast<uintptr_t>(held_.data());
    first_ = held_.data() + (ALIGN - address % ALIGN) % ALIGN / sizeof(A);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data() { return first_; }
  const A* data() const { return first_; }
  A& operator[](int64_t i) { return first_[i]; }
  void fill(A value, int64_t from = 0) { std::fill(first_ + from, first_ + size_, value); }

 private:
  std::vector<A> held_;
  int64_t size_;
  A* first_;
};

// C = keep · C + A B, for `rows` rows (and up to the next multiple of the tile's height, at most EDGE, which
// hold anything). B is [depth, width] and C [EDGE, width], dense, width padded; A[r, p] stands at a + r·a_row
// + p·a_step. keep is per row; null: C is overwritten. A and B may be of other words than C, such as pairs.
template <class A, class Word = A>
struct Product {
  const Word* a;
  int64_t a_row, a_step;
  const Word* b;
  int64_t width, depth, rows;
  A* c;
  const A* keep;
};

template <int W, int MR, int NV, class A>
GAUGEKIT_INLINE void product_tile(const Product<A>& f, const A* a, int64_t column, int64_t row) {
  Vector<A, W> sum[MR][NV];
  const A* b = f.b + column;
  A* c = f.c + row * f.width + column;
#pragma GCC unroll 24
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n)
      sum[m][n] = f.keep ? f.keep[row + m] * load<W>(c + m * f.width + n * W, W) : Vector<A, W>{};
  for (int64_t p = 0; p < f.depth; ++p, b += f.width, a += f.a_step) {
    Vector<A, W> right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) right[n] = load<W>(b + n * W, W);
#pragma GCC unroll 24
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sum[m][n] += a[m * f.a_row] * right[n];
  }
#pragma GCC unroll 24
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store<W>(c + m * f.width + n * W, sum[m][n], W);
}

template <int W, int NV, class A>
GAUGEKIT_INLINE void product_columns(const Product<A>& f, int64_t column) {
  constexpr int TILE = W * sizeof(A) == ALIGN ? 24 : 12;  // sums held in registers
  constexpr int MR = TILE / NV > 12 ? 12 : TILE / NV;
  for (int64_t row = 0; row < f.rows; row += MR) product_tile<W, MR, NV>(f, f.a + row * f.a_row, column, row);
}

template <class A, int W>
GAUGEKIT_INLINE void product_body(const Product<A>& f) {
  constexpr int MOST = W * sizeof(A) == ALIGN ? 4 : 2;
  int64_t column = 0;
  for (; column + MOST * W <= f.width; column += MOST * W) product_columns<W, MOST>(f, column);
  const int64_t left = (f.width - column) / W;
  if (MOST > 3 && left == 3) return product_columns<W, 3>(f, column);
  if (MOST > 2 && left == 2) return product_columns<W, 2>(f, column);
  if (left == 1) product_columns<W, 1>(f, column);
}

GAUGEKIT_BLOCK_KERNEL(multiply, product_body, Product)

// 2^x to a few units in the last place; 0 below the normal numbers, NaN of NaN.
template <int W>
GAUGEKIT_INLINE Vector<float, W> power_of_two(Vector<float, W> x) {
  using V = Vector<float, W>;
  const V y = x < -126.0f ? splat<float, W>(-126.0f) : x;
  const V shifted = y + 0x1.8p23f, r = y - (shifted - 0x1.8p23f);
  V sum =
      splat<float, W>(1.5453162945e-4f);  // (2^r - 1) / r, interpolated at Chebyshev's nodes of |r| <= 1/2
  sum = sum * r + 1.3390863365e-3f;
  sum = sum * r + 9.6180825573e-3f;
  sum = sum * r + 5.5503571142e-2f;
  sum = sum * r + 0.24022650761f;
  sum = sum * r + 0.69314718803f;
  sum = sum * r + 1.0f;
  const V scale = bits_as<V>((bits_as<Vector<uint32_t, W>>(shifted) << 23) + (uint32_t(127) << 23));
  return x < -126.0f ? V{} : sum * scale;
}

template <int W>
GAUGEKIT_INLINE Vector<double, W> power_of_two(Vector<double, W> x) {
  using V = Vector<double, W>;
  constexpr double TERMS[] = {1.36914888539041289e-12, 2.56784359934882051e-11,
                              4.44553827187081150e-10, 7.05491162080112333e-9,
                              1.01780860092396997e-7,  1.32154867901443095e-6,
                              1.52527338040598403e-5,  1.54035303933816100e-4,
                              1.33335581464284434e-3,  9.61812910762847716e-3,
                              5.55041086648215800e-2,  0.240226506959100712,
                              0.693147180559945309,    1.0};  // ln(2)^i / i!
  const V y = x < -1022.0 ? splat<double, W>(-1022.0) : x;
  const V shifted = y + 0x1.8p52, r = y - (shifted - 0x1.8p52);
  V sum = splat<double, W>(TERMS[0]);
#pragma GCC unroll 14
  for (int i = 1; i < 14; ++i) sum = sum * r + TERMS[i];
  const V scale = bits_as<V>((bits_as<Vector<uint64_t, W>>(shifted) << 52) + (uint64_t(1023) << 52));
  return x < -1022.0 ? V{} : sum * scale;
}

template <int W, class A>
GAUGEKIT_INLINE A largest(Vector<A, W> x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    Vector<A, W / 2> half[2];
    std::memcpy(half, &x, sizeof(x));
    return largest<W / 2, A>(half[0] > half[1] ? half[0] : half[1]);
  }
}

template <int W, class A>
GAUGEKIT_INLINE A total(Vector<A, W> x) {
  if constexpr (W == 1) {
    return x[0];
  } else {
    Vector<A, W / 2> half[2];
    std::memcpy(half, &x, sizeof(x));
    return total<W / 2, A>(half[0] + half[1]);
  }
}

template <int W, class A>
GAUGEKIT_INLINE Vector<A, W> lanes() {
  Vector<A, W> x;
  for (int i = 0; i < W; ++i) x[i] = static_cast<A>(i);
  return x;
}

// x where the columns from `at` on lie in first <= · < last, else `other`. Two steps: compilers make
// lane-wise code of a conjunction.
template <int W, class A>
GAUGEKIT_INLINE Vector<A, W> inside(Vector<A, W> x, A at, A first, A last, A other) {
  const Vector<A, W> column = lanes<W, A>() + at, hidden = splat<A, W>(other);
  const Vector<A, W> from = column < first ? hidden : x;
  return column < last ? from : hidden;
}

// Scores of a block, in powers of two, to the softmax's numerators, and the running maxima and sums of their
// rows. A row's visible columns are first <= · < last.
template <class A>
struct Weights {
  A* p;  // [EDGE, EDGE]
  const A *first, *last;
  int64_t rows;
  bool masked;
  A *top, *keep;  // [EDGE]; keep: what earlier blocks of the row are scaled with
  A* sum;         // [EDGE, lanes]: each lane its own sum, until add_lanes
};

template <class A, int W>
GAUGEKIT_INLINE void weights_body(const Weights<A>& given) {
  const Weights<A> f = given;  // held in registers: stores through memcpy might else change it
  using V = Vector<A, W>;
  constexpr int COUNT = EDGE / W;
  A before[EDGE];
  std::memcpy(before, f.top, sizeof(before));
  for (int64_t r = 0; r < f.rows; ++r) {
    A* p = f.p + r * EDGE;
    if (f.masked)
      for (int i = 0; i < COUNT; ++i)
        store<W>(p + i * W,
                 inside<W, A>(load<W>(p + i * W, W), A(i * W), f.first[r], f.last[r],
                              -std::numeric_limits<A>::infinity()),
                 W);
    V most = load<W>(p, W);
    for (int i = 1; i < COUNT; ++i) {
      const V x = load<W>(p + i * W, W);
      most = x > most ? x : most;
    }
    f.top[r] = std::max(f.top[r], largest<W, A>(most));
  }
  for (int i = 0; i < COUNT; ++i)
    store<W>(f.keep + i * W, power_of_two<W>(load<W>(before + i * W, W) - load<W>(f.top + i * W, W)), W);
  for (int64_t r = 0; r < f.rows; ++r) {
    A* p = f.p + r * EDGE;
    V sum = f.keep[r] * load<W>(f.sum + r * W, W);
    for (int i = 0; i < COUNT; ++i) {
      const V x = power_of_two<W>(load<W>(p + i * W, W) - f.top[r]);
      store<W>(p + i * W, x, W);
      sum += x;
    }
    store<W>(f.sum + r * W, sum, W);
  }
}

GAUGEKIT_BLOCK_KERNEL(weigh, weights_body, Weights)

// to[r]: the sum of row r's lanes.
template <class A>
struct Lanes {
  const A* sum;  // [EDGE, lanes]
  int64_t rows;
  A* to;  // [rows]
};

template <class A, int W>
GAUGEKIT_INLINE void lanes_body(const Lanes<A>& f) {
  for (int64_t r = 0; r < f.rows; ++r) f.to[r] = total<W, A>(load<W>(f.sum + r * W, W));
}

GAUGEKIT_BLOCK_KERNEL(add_lanes, lanes_body, Lanes)

// The backward's block: scores p to probabilities, and d = dO Vᵀ to the slopes p · (d − share) of the scores.
template <class A>
struct Slopes {
  A *p, *d;  // [EDGE, EDGE]
  const A *first, *last;
  int64_t rows;
  bool masked;
  const A *log, *share;  // [rows]: the log-sum-exp, in powers of two, and dO · O
};

template <class A, int W>
GAUGEKIT_INLINE void slopes_body(const Slopes<A>& given) {
  const Slopes<A> f = given;
  using V = Vector<A, W>;
  for (int64_t r = 0; r < f.rows; ++r)
    for (int64_t i = 0; i < EDGE; i += W) {
      A *p = f.p + r * EDGE + i, *d = f.d + r * EDGE + i;
      V x = power_of_two<W>(load<W>(p, W) - f.log[r]);
      if (f.masked) x = inside<W, A>(x, A(i), f.first[r], f.last[r], A(0));
      store<W>(p, x, W);
      store<W>(d, x * (load<W>(d, W) - f.share[r]), W);
    }
}

GAUGEKIT_BLOCK_KERNEL(slope, slopes_body, Slopes)

// share[r] = a[r] · b[r]; a and b [rows, width], dense, width padded.
template <class A>
struct Shares {
  const A *a, *b;
  int64_t width, rows;
  A* share;
};

template <class A, int W>
GAUGEKIT_INLINE void shares_body(const Shares<A>& f) {
  for (int64_t r = 0; r < f.rows; ++r) {
    Vector<A, W> sum{};
    for (int64_t i = r * f.width; i < (r + 1) * f.width; i += W)
      sum += load<W>(f.a + i, W) * load<W>(f.b + i, W);
    f.share[r] = total<W, A>(sum);
  }
}

GAUGEKIT_BLOCK_KERNEL(share_rows, shares_body, Shares)

// Rows `step` apart, scaled, into rows of the accumulator's type `stride` apart, with zeros up to there.
template <class S>
struct Reading {
  const S* from;
  int64_t step;
  accumulator<S>* to;
  int64_t stride, rows, columns;
  accumulator<S> scale;
};

template <class S, int W>
GAUGEKIT_INLINE void reading_body(const Reading<S>& f) {
  for (int64_t r = 0; r < f.rows; ++r) {
    const S* from = f.from + r * f.step;
    accumulator<S>* to = f.to + r * f.stride;
    columns<W>(f.columns, GAUGEKIT_STEP { store<W>(to + i, f.scale * load<W>(from + i, count), W); });
    for (int64_t i = (f.columns + W - 1) / W * W; i < f.stride; ++i) to[i] = 0;
  }
}

GAUGEKIT_BLOCK_KERNEL(read_lines, reading_body, Reading)

// The way back.
template <class S>
struct Writing {
  S* to;
  int64_t step;
  const accumulator<S>* from;
  int64_t stride, rows, columns;
  accumulator<S> scale;
};

template <class S, int W>
GAUGEKIT_INLINE void writing_body(const Writing<S>& f) {
  for (int64_t r = 0; r < f.rows; ++r) {
    const accumulator<S>* from = f.from + r * f.stride;
    S* to = f.to + r * f.step;
    columns<W>(f.columns, GAUGEKIT_STEP { store<W>(to + i, f.scale * load<W>(from + i, count), count); });
  }
}

GAUGEKIT_BLOCK_KERNEL(write_lines, writing_body, Writing)

// from [EDGE, stride] to to [columns, EDGE]; rows from `rows` on become zeros.
template <class A>
inline void turn(const A* from, int64_t stride, int64_t rows, int64_t columns, A* to) {
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t r = 0; r < EDGE; ++r) to[i * EDGE + r] = r < rows ? from[r * stride + i] : A(0);
}

}  // namespace gaugekit

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
