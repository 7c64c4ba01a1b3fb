// The backward kernel of shaped_combine: see the header.
#include "cpu/shaped_combine_backward.h"

namespace gaugekit {
namespace {

// Dot products of one head, in lanes that are flushed into doubles.
template <class A, int W>
struct Dots {
  A lane[GAIN_COUNT][W] = {};
  double total[GAIN_COUNT] = {};
  GAUGEKIT_INLINE void add(Gain gain, Vector<A, W> products) {
    store<W>(lane[gain], load<W>(lane[gain], W) + products, W);
  }
  GAUGEKIT_NOINLINE void flush() {
    for (int k = 0; k < GAIN_COUNT; ++k)
      for (int i = 0; i < W; ++i) total[k] += lane[k][i], lane[k][i] = 0;
  }
};

// A query that starts to be seen: dA, its part of dbeta, and (`recent` given) grad / n into the sum that its
// keys share.
template <int W, class A, class S>
GAUGEKIT_INLINE void backward_query(const S* grad, const S* a, S* da, A beta, A inverse, A* recent,
                                    Dots<A, W>* dots, int64_t width) {
  Vector<A, W> product{};
  columns<W>(
      width, GAUGEKIT_STEP {
        const Vector<A, W> g = load<W>(grad + i, count);
        if (recent) store<W>(recent + i, load<W>(recent + i, count) + inverse * g, count);
        if (dots) product += g * load<W>(a + i, count);
        store<W>(da + i, beta * g, count);
      });
  if (dots) dots->add(BETA, product);
}

GAUGEKIT_ROW(backward_query)

// One key row for one head: its part of dV (summed over the heads of the group in `shared`), dV0, dalpha,
// dgamma, dlambda.
template <int W, class A, class S>
GAUGEKIT_INLINE void backward_key(const S* grad, const S* v, const S* v0, A direct, A lambda,
                                  const A* rounded, const A* recent, A gamma, bool alpha, S* dv, S* dv0,
                                  A* shared, bool first, bool last, Dots<A, W>* dots, int64_t width) {
  A* shared0 = shared + width;
  Vector<A, W> alpha_dot{}, gamma_dot{}, lambda_dot{};
  columns<W>(
      width, GAUGEKIT_STEP {
        const Vector<A, W> value = load<W>(v + i, count);
        Vector<A, W> sum{}, sum0{};
        if (!first) sum = load<W>(shared + i, count);
        if (recent) {
          const Vector<A, W> later = load<W>(rounded + i, count) + load<W>(recent + i, count);
          sum -= gamma * later;
          gamma_dot -= value * later;
        }
        if (grad) {
          const Vector<A, W> g = load<W>(grad + i, count);
          sum += direct * g;
          if (alpha) alpha_dot += g * value;
          if (v0) {
            if (!first) sum0 = load<W>(shared0 + i, count);
            sum0 += lambda * g;
            lambda_dot += g * (load<W>(v0 + i, count) - value);
            if (last)
              store<W>(dv0 + i, sum0, count);
            else
              store<W>(shared0 + i, sum0, count);
          }
        }
        if (last)
          store<W>(dv + i, sum, count);
        else
          store<W>(shared + i, sum, count);
      });
  if (recent) dots->add(GAMMA, gamma_dot);
  if (grad && alpha) dots->add(ALPHA, alpha_dot);
  if (grad && v0) dots->add(LAMBDA, lambda_dot);
}

GAUGEKIT_ROW(backward_key)

// Both at once where the key stands at the position of the query that starts to be seen: plain causal
// attention with a head a group and the three gains of shaped attention, each row read once.
template <int W, class A, class S>
GAUGEKIT_INLINE void backward_pair(const S* grad, const S* a, const S* v, A alpha, A beta, A gamma, A inverse,
                                   const A* rounded, A* recent, S* da, S* dv, Dots<A, W>& dots,
                                   int64_t width) {
  Vector<A, W> alpha_dot{}, beta_dot{}, gamma_dot{};
  columns<W>(
      width, GAUGEKIT_STEP {
        const Vector<A, W> g = load<W>(grad + i, count), value = load<W>(v + i, count);
        const Vector<A, W> sum = load<W>(recent + i, count) + inverse * g;
        store<W>(recent + i, sum, count);
        const Vector<A, W> later = load<W>(rounded + i, count) + sum;
        beta_dot += g * load<W>(a + i, count);
        gamma_dot -= value * later;
        alpha_dot += g * value;
        store<W>(da + i, beta * g, count);
        store<W>(dv + i, alpha * g - gamma * later, count);
      });
  dots.add(ALPHA, alpha_dot);
  dots.add(BETA, beta_dot);
  dots.add(GAMMA, gamma_dot);
}

// The keys of some chunks of a sequence and the queries that start to be seen there, for some groups.
template <class S, int W>
GAUGEKIT_INLINE void backward_groups(const Backward<S>& f, const Sequence& s, Span chunks, Span groups) {
  using A = accumulator<S>;
  const Shape& shape = f.shape;
  const int64_t width = shape.width, per_group = shape.heads_of_group(), b = s.batch;
  const int64_t first_head = groups.first * per_group, last_head = groups.last * per_group;
  const bool mean = f.gains.has_gamma;
  const bool paired = mean && f.gains.has_alpha && f.gains.has_beta && !f.gains.has_lambda && shape.causal &&
                      !shape.window && per_group == 1;
  RunningSum<A, W> sums(mean ? (last_head - first_head) * width : 0, shape.window != 0);
  std::vector<Dots<A, W>> dots(last_head - first_head);
  std::vector<A> shared(2 * width);
  int64_t since_flush = 0;
  const auto flush = [&]() __attribute__((always_inline)) {
    if (++since_flush < FLUSH) return;
    since_flush = 0;
    for (auto& d : dots) d.flush();
  };
  const auto zero_queries = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
    for (int64_t t = from; t < to; ++t)
      for (int64_t h = first_head; h < last_head; ++h)
        std::fill_n(f.da.at(b, h, s.first_query + t), width, S{});
  };
  // grad / n of query t into the sums, or out of them.
  const auto share = [&](int64_t t, A sign) __attribute__((always_inline)) {
    const A inverse = sign / static_cast<A>(keys_of(shape, s, t).count());
    for (int64_t h = first_head; h < last_head; ++h)
      sums.add((h - first_head) * width, f.grad.at(b, h, s.first_query + t), inverse, width);
    sums.row_done();
  };
  // dA and dbeta of query t, and its share unless a window or all keys have it already.
  const auto enter = [&](int64_t t) __attribute__((always_inline)) {
    const int64_t row = s.first_query + t;
    const A inverse = A(1) / static_cast<A>(keys_of(shape, s, t).count());
    const bool add = mean && shape.causal && !shape.window;
    if (mean && shape.window) share(t, A(1));
    for (int64_t h = first_head; h < last_head; ++h) {
      const int64_t i = h - first_head;
      backward_query_called<W, A, S>(f.grad.at(b, h, row), f.a.at(b, h, row), f.da.at(b, h, row),
                                     f.gains.beta[h], inverse, add ? &sums.recent[i * width] : nullptr,
                                     f.gains.has_beta ? &dots[i] : nullptr, width);
    }
    if (add) sums.row_done();
    flush();
  };
  for (int64_t c = chunks.last - 1; c >= chunks.first; --c) {
    const Span keys = keys_of_chunk(shape, s, c), own_queries = queries_of_chunk(shape, s, c);
    const int64_t item = s.chunks_before + c;
    if (mean) sums.next_chunk(f.sums ? f.sums + (item * shape.heads + first_head) * width : nullptr);
    int64_t entered = 0, left = 0;
    if (shape.open()) {
      if (s.keys == 0) zero_queries(own_queries.first, own_queries.last);
      for (int64_t t = own_queries.last; s.keys && t-- > own_queries.first;) enter(t);
    } else {
      const bool newest = keys.last == s.keys;
      entered = s.keys == 0 ? s.queries
                : newest    ? queries_of(shape, s, s.keys - 1).last
                            : queries_of(shape, s, keys.last).first;
      if (newest) zero_queries(entered, s.queries);
      left = s.keys ? queries_of(shape, s, keys.last - 1).last : entered;
      for (int64_t t = left; mean && shape.window && t-- > entered;) share(t, A(1));
    }
    for (int64_t j = keys.last - 1; j >= keys.first; --j) {
      const Span queries = queries_of(shape, s, j);
      if (paired && queries.first == j - s.start && entered == queries.first + 1) {
        const int64_t row = s.first_query + --entered, key = s.first_key + j;
        const A inverse = A(1) / static_cast<A>(j + 1);
        for (int64_t h = first_head; h < last_head; ++h) {
          const int64_t column = (h - first_head) * width;
          backward_pair<W, A, S>(f.grad.at(b, h, row), f.a.at(b, h, row), f.v.at(b, h, key), f.gains.alpha[h],
                                 f.gains.beta[h], f.gains.gamma[h], inverse, &sums.rounded[column],
                                 &sums.recent[column], f.da.at(b, h, row), f.dv.at(b, h, key),
                                 dots[h - first_head], width);
        }
        sums.row_done();
        flush();
        continue;
      }
      while (entered > queries.first) enter(--entered);
      while (mean && shape.window && left > queries.last) share(--left, A(-1));
      const int64_t t = j - s.start;
      const bool own = t >= 0 && t < s.queries && (f.gains.has_alpha || f.gains.has_lambda);
      const bool reference = own && f.gains.has_lambda;
      for (int64_t h = first_head; h < last_head; ++h) {
        const int64_t g = h / per_group, i = h - first_head, row = s.first_query + t, key = s.first_key + j;
        backward_key_called<W, A, S>(
            own ? f.grad.at(b, h, row) : nullptr, f.v.at(b, g, key), reference ? f.v0.at(b, g, row) : nullptr,
            f.gains.alpha[h] - f.gains.lambda[h], f.gains.lambda[h],
            mean ? &sums.rounded[i * width] : nullptr, mean ? &sums.recent[i * width] : nullptr,
            f.gains.gamma[h], f.gains.has_alpha, f.dv.at(b, g, key),
            reference ? f.dv0.at(b, g, row) : nullptr, shared.data(), h % per_group == 0,
            (h + 1) % per_group == 0, &dots[i], width);
      }
      flush();
    }
    if (c == 0) zero_queries(0, entered);
    for (int64_t t = own_queries.first; f.dv0 && t < own_queries.last; ++t) {
      const int64_t p = s.start + t;
      for (int64_t g = groups.first; (p < 0 || p >= s.keys) && g < groups.last; ++g)
        std::fill_n(f.dv0.at(b, g, s.first_query + t), width, S{});
    }
    for (int64_t h = first_head; h < last_head; ++h) {
      Dots<A, W>& d = dots[h - first_head];
      d.flush();
      std::copy_n(d.total, GAIN_COUNT, f.partial + (item * shape.heads + h) * GAIN_COUNT);
      std::fill_n(d.total, GAIN_COUNT, 0.0);
    }
    since_flush = 0;
  }
}

}  // namespace

GAUGEKIT_SWEEP(shaped_combine_backward, backward_groups, Backward)

}  // namespace gaugekit
