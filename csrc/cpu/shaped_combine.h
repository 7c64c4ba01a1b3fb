// O = beta A + alpha V - gamma C V + lambda (V0 - V), one sweep; and its gradients, one sweep. Free of torch.
//
// C V is the mean of the value rows a query sees. Queries are visited in order, so the rows seen are a window
// whose ends only move forward: one running sum a column is enough. The sum is kept as `rounded + recent`: at
// most FLUSH rows are added in the accumulator type before they go into a double, so its error does not grow
// with the length. Under a window, where a row that leaves is subtracted, rows go into the double at once:
// nothing would wash out the rounding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/simd.h"

namespace gaugekit {

constexpr int64_t FLUSH = 32;

// One sequence: its queries, its real keys, and the position of its first query among them.
struct Sequence {
  int64_t batch, first_query, queries, first_key, keys, start;
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
};

struct Span {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

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

// recent += scale * row
template <int W, class A, class S>
GAUGEKIT_INLINE void accumulate(A* recent, const S* row, A scale, int64_t width) {
  for (int64_t i = 0; i < width; i += W) {
    const int64_t left = width - i;
    store<W>(recent + i, load<W>(recent + i, left) + scale * load<W>(row + i, left), left);
  }
}

// total += scale * row, and rounded to it
template <int W, class A, class S>
GAUGEKIT_INLINE void accumulate(double* total, A* rounded, const S* row, A scale, int64_t width) {
  for (int64_t i = 0; i < width; i += W) {
    const int64_t left = width - i;
    const Vector<A, W> term = scale * load<W>(row + i, left);
    const Vector<double, W> sum = load<W>(total + i, left) + __builtin_convertvector(term, Vector<double, W>);
    store<W>(total + i, sum, left);
    store<W>(rounded + i, __builtin_convertvector(sum, Vector<A, W>), left);
  }
}

// Running sums of `count` columns.
template <class A>
struct RunningSum {
  RunningSum(int64_t count, bool window) : recent(count), rounded(count), total(count), window(window) {}

  template <int W, class S>
  GAUGEKIT_INLINE void add(int64_t column, const S* row, A scale, int64_t width) {
    if (window)
      accumulate<W>(&total[column], &rounded[column], row, scale, width);
    else
      accumulate<W>(&recent[column], row, scale, width);
  }

  GAUGEKIT_INLINE void flush() {
    for (size_t i = 0; i < total.size(); ++i) {
      total[i] += recent[i];
      rounded[i] = static_cast<A>(total[i]);
      recent[i] = 0;
    }
  }

  std::vector<A> recent, rounded;
  std::vector<double> total;
  bool window;
};

// --- forward
// -------------------------------------------------------------------------------------------------------
template <class S>
struct Forward {
  using A = accumulator<S>;
  Shape shape;
  Gains<A> gains;
  Rows<const S> a, v, v0;
  Rows<S> out;  // may be a itself
};

// One output row. The mean is scale * (rounded + recent); null pointers leave their term out.
template <int W, class A, class S>
GAUGEKIT_INLINE void combine_row(S* out, const S* a, A beta, const S* v, A direct, const S* v0, A lambda,
                                 const A* rounded, const A* recent, A scale, int64_t width) {
  for (int64_t i = 0; i < width; i += W) {
    const int64_t left = width - i;
    Vector<A, W> sum{};
    if (a) sum = beta * load<W>(a + i, left);
    if (recent) sum -= scale * (load<W>(rounded + i, left) + load<W>(recent + i, left));
    if (v) sum += direct * load<W>(v + i, left);
    if (v0) sum += lambda * load<W>(v0 + i, left);
    store<W>(out + i, sum, left);
  }
}

template <class S, int W>
GAUGEKIT_INLINE void forward_heads(const Forward<S>& f, const Sequence& s, int64_t first_head,
                                   int64_t last_head) {
  using A = accumulator<S>;
  const int64_t width = f.shape.width, per_group = f.shape.heads_of_group(), b = s.batch;
  const int64_t first_group = first_head / per_group, last_group = (last_head - 1) / per_group + 1;
  const bool mean = f.gains.has_gamma;
  RunningSum<A> sums(mean ? (last_group - first_group) * width : 0, f.shape.window != 0);
  int64_t added = -1, removed = 0, since_flush = 0;
  const auto slide = [&](int64_t& end, int64_t to, A sign) __attribute__((always_inline)) {
    for (; end < to; ++end) {
      for (int64_t g = first_group; g < last_group; ++g)
        sums.template add<W>((g - first_group) * width, f.v.at(b, g, s.first_key + end), sign, width);
      if (++since_flush == FLUSH) sums.flush(), since_flush = 0;
    }
  };
  for (int64_t t = 0; t < s.queries; ++t) {
    const Span keys = keys_of(f.shape, s, t);
    const int64_t seen = keys.count(), query = s.first_query + t, p = s.start + t;
    const bool own = p >= 0 && p < s.keys;
    if (mean && seen) {
      if (added < 0) added = removed = keys.first;
      slide(added, keys.last, A(1));
      slide(removed, keys.first, A(-1));
    }
    for (int64_t h = first_head; h < last_head; ++h) {
      const int64_t g = h / per_group, column = (g - first_group) * width;
      const bool value = own && (f.gains.has_alpha || f.gains.has_lambda);
      const bool reference = own && f.gains.has_lambda;
      combine_row<W, A, S>(f.out.at(b, h, query), seen ? f.a.at(b, h, query) : nullptr, f.gains.beta[h],
                           value ? f.v.at(b, g, s.first_key + p) : nullptr,
                           f.gains.alpha[h] - f.gains.lambda[h], reference ? f.v0.at(b, g, query) : nullptr,
                           f.gains.lambda[h], mean && seen ? &sums.rounded[column] : nullptr,
                           mean && seen ? &sums.recent[column] : nullptr,
                           seen ? f.gains.gamma[h] / static_cast<A>(seen) : A(0), width);
    }
  }
}

// --- backward
// ------------------------------------------------------------------------------------------------------
enum Gain { ALPHA, BETA, GAMMA, LAMBDA, GAIN_COUNT };

template <class S>
struct Backward {
  using A = accumulator<S>;
  Shape shape;
  Gains<A> gains;
  Rows<const S> grad, a, v, v0;
  Rows<S> da, dv, dv0;
  double* partial;  // [sequences, heads, GAIN_COUNT], each entry written by one thread
};

// Dot products of one head, in lanes that are flushed into doubles.
template <class A, int W>
struct Dots {
  A lane[GAIN_COUNT][W] = {};
  double total[GAIN_COUNT] = {};
  GAUGEKIT_INLINE void add(Gain gain, Vector<A, W> products) {
    store<W>(lane[gain], load<W>(lane[gain], W) + products, W);
  }
  GAUGEKIT_INLINE void flush() {
    for (int k = 0; k < GAIN_COUNT; ++k)
      for (int i = 0; i < W; ++i) total[k] += lane[k][i], lane[k][i] = 0;
  }
};

// A query that starts to be seen: dA, its part of dbeta, and (`recent` given) grad / n into the sum its keys
// share.
template <int W, class A, class S>
GAUGEKIT_INLINE void backward_query(const S* grad, const S* a, S* da, A beta, A inverse, A* recent,
                                    Dots<A, W>* dots, int64_t width) {
  Vector<A, W> product{};
  for (int64_t i = 0; i < width; i += W) {
    const int64_t left = width - i;
    const Vector<A, W> g = load<W>(grad + i, left);
    if (recent) store<W>(recent + i, load<W>(recent + i, left) + inverse * g, left);
    if (dots) product += g * load<W>(a + i, left);
    store<W>(da + i, beta * g, left);
  }
  if (dots) dots->add(BETA, product);
}

// One key row for one head: its part of dV (summed over the heads of the group in `shared`), dV0, dalpha,
// dgamma, dlambda.
template <int W, class A, class S>
GAUGEKIT_INLINE void backward_key(const S* grad, const S* v, const S* v0, A direct, A lambda,
                                  const A* rounded, const A* recent, A gamma, bool alpha, S* dv, S* dv0,
                                  A* shared, bool first, bool last, Dots<A, W>& dots, int64_t width) {
  A* shared0 = shared + width;
  Vector<A, W> alpha_dot{}, gamma_dot{}, lambda_dot{};
  for (int64_t i = 0; i < width; i += W) {
    const int64_t left = width - i;
    const Vector<A, W> value = load<W>(v + i, left);
    Vector<A, W> sum{}, sum0{};
    if (!first) sum = load<W>(shared + i, left);
    if (recent) {
      const Vector<A, W> later = load<W>(rounded + i, left) + load<W>(recent + i, left);
      sum -= gamma * later;
      gamma_dot -= value * later;
    }
    if (grad) {
      const Vector<A, W> g = load<W>(grad + i, left);
      sum += direct * g;
      if (alpha) alpha_dot += g * value;
      if (v0) {
        if (!first) sum0 = load<W>(shared0 + i, left);
        sum0 += lambda * g;
        lambda_dot += g * (load<W>(v0 + i, left) - value);
        if (last)
          store<W>(dv0 + i, sum0, left);
        else
          store<W>(shared0 + i, sum0, left);
      }
    }
    if (last)
      store<W>(dv + i, sum, left);
    else
      store<W>(shared + i, sum, left);
  }
  if (recent) dots.add(GAMMA, gamma_dot);
  if (grad && alpha) dots.add(ALPHA, alpha_dot);
  if (grad && v0) dots.add(LAMBDA, lambda_dot);
}

template <class S, int W>
GAUGEKIT_INLINE void backward_groups(const Backward<S>& f, const Sequence& s, int64_t index,
                                     int64_t first_group, int64_t last_group) {
  using A = accumulator<S>;
  const Shape& shape = f.shape;
  const int64_t width = shape.width, per_group = shape.heads_of_group(), b = s.batch;
  const int64_t first_head = first_group * per_group, last_head = last_group * per_group;
  const bool mean = f.gains.has_gamma;
  RunningSum<A> sums(mean ? (last_head - first_head) * width : 0, shape.window != 0);
  std::vector<Dots<A, W>> dots(last_head - first_head);
  std::vector<A> shared(2 * width);
  int64_t since_flush = 0;
  const auto flush = [&]() __attribute__((always_inline)) {
    if (++since_flush < FLUSH) return;
    since_flush = 0;
    if (mean) sums.flush();
    for (auto& d : dots) d.flush();
  };
  const auto zero_queries = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
    for (int64_t t = from; t < to; ++t)
      for (int64_t h = first_head; h < last_head; ++h)
        std::fill_n(f.da.at(b, h, s.first_query + t), width, S{});
  };
  Span live = queries_of(shape, s, s.keys - 1);
  if (s.keys == 0) live = {s.queries, s.queries};
  int64_t entered = live.last, left = live.last;
  zero_queries(live.last, s.queries);
  for (int64_t j = s.keys - 1; j >= 0; --j) {
    const Span queries = queries_of(shape, s, j);
    while (entered > queries.first) {
      const int64_t t = --entered, seen = keys_of(shape, s, t).count(), row = s.first_query + t;
      for (int64_t h = first_head; h < last_head; ++h) {
        const int64_t i = h - first_head;
        const A inverse = A(1) / static_cast<A>(seen);
        if (mean && shape.window) sums.template add<W>(i * width, f.grad.at(b, h, row), inverse, width);
        backward_query<W, A, S>(f.grad.at(b, h, row), f.a.at(b, h, row), f.da.at(b, h, row), f.gains.beta[h],
                                inverse, mean && !shape.window ? &sums.recent[i * width] : nullptr,
                                f.gains.has_beta ? &dots[i] : nullptr, width);
      }
      flush();
    }
    while (left > queries.last) {
      const int64_t t = --left, seen = keys_of(shape, s, t).count();
      for (int64_t h = first_head; mean && h < last_head; ++h)
        sums.template add<W>((h - first_head) * width, f.grad.at(b, h, s.first_query + t),
                             A(-1) / static_cast<A>(seen), width);
      flush();
    }
    const int64_t t = j - s.start;
    const bool own = t >= 0 && t < s.queries && (f.gains.has_alpha || f.gains.has_lambda);
    const bool reference = own && f.gains.has_lambda;
    for (int64_t h = first_head; h < last_head; ++h) {
      const int64_t g = h / per_group, i = h - first_head, row = s.first_query + t, key = s.first_key + j;
      backward_key<W, A, S>(own ? f.grad.at(b, h, row) : nullptr, f.v.at(b, g, key),
                            reference ? f.v0.at(b, g, row) : nullptr, f.gains.alpha[h] - f.gains.lambda[h],
                            f.gains.lambda[h], mean ? &sums.rounded[i * width] : nullptr,
                            mean ? &sums.recent[i * width] : nullptr, f.gains.gamma[h], f.gains.has_alpha,
                            f.dv.at(b, g, key), reference ? f.dv0.at(b, g, row) : nullptr, shared.data(),
                            h % per_group == 0, (h + 1) % per_group == 0, dots[i], width);
    }
    flush();
  }
  zero_queries(0, entered);
  for (int64_t t = 0; f.dv0 && t < s.queries; ++t) {
    const int64_t p = s.start + t;
    for (int64_t g = first_group; (p < 0 || p >= s.keys) && g < last_group; ++g)
      std::fill_n(f.dv0.at(b, g, s.first_query + t), width, S{});
  }
  for (int64_t h = first_head; h < last_head; ++h) {
    Dots<A, W>& d = dots[h - first_head];
    d.flush();
    std::copy_n(d.total, GAIN_COUNT, f.partial + (index * shape.heads + h) * GAIN_COUNT);
  }
}

// --- one function a kernel and instruction set
// ----------------------------------------------------------------------- W accumulators fill one register of
// the instruction set.
#define GAUGEKIT_FOR_ISA(NAME, TARGET, BYTES)                                                        \
  template <class S>                                                                                 \
  TARGET void forward_##NAME(const Forward<S>& f, const Sequence& s, int64_t first, int64_t last) {  \
    forward_heads<S, BYTES / sizeof(accumulator<S>)>(f, s, first, last);                             \
  }                                                                                                  \
  template <class S>                                                                                 \
  TARGET void backward_##NAME(const Backward<S>& f, const Sequence& s, int64_t index, int64_t first, \
                              int64_t last) {                                                        \
    backward_groups<S, BYTES / sizeof(accumulator<S>)>(f, s, index, first, last);                    \
  }
GAUGEKIT_FOR_ISA(portable, , 16)
#ifdef GAUGEKIT_X86
GAUGEKIT_FOR_ISA(avx2, GAUGEKIT_AVX2, 32)
GAUGEKIT_FOR_ISA(avx512, GAUGEKIT_AVX512, 64)
#endif
#undef GAUGEKIT_FOR_ISA

template <class S>
void shaped_combine(const Forward<S>& f, const Sequence& s, int64_t first_head, int64_t last_head) {
#ifdef GAUGEKIT_X86
  if (isa() == Isa::avx512) return forward_avx512(f, s, first_head, last_head);
  if (isa() == Isa::avx2) return forward_avx2(f, s, first_head, last_head);
#endif
  forward_portable(f, s, first_head, last_head);
}

template <class S>
void shaped_combine_backward(const Backward<S>& f, const Sequence& s, int64_t index, int64_t first_group,
                             int64_t last_group) {
#ifdef GAUGEKIT_X86
  if (isa() == Isa::avx512) return backward_avx512(f, s, index, first_group, last_group);
  if (isa() == Isa::avx2) return backward_avx2(f, s, index, first_group, last_group);
#endif
  backward_portable(f, s, index, first_group, last_group);
}

}  // namespace gaugekit
