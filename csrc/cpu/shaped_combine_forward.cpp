// The forward kernel of shaped_combine: see the header.
#include "cpu/shaped_combine_forward.h"

namespace gaugekit {
namespace {

// One output row. The mean is scale * (rounded + recent); null pointers leave their term out.
template <int W, class A, class S>
GAUGEKIT_INLINE void combine_row(S* out, const S* a, A beta, const S* v, A direct, const S* v0, A lambda,
                                 const A* rounded, const A* recent, A scale, int64_t width) {
  columns<W>(
      width, GAUGEKIT_STEP {
        Vector<A, W> sum{};
        if (a) sum = beta * load<W>(a + i, count);
        if (recent) sum -= scale * (load<W>(rounded + i, count) + load<W>(recent + i, count));
        if (v) sum += direct * load<W>(v + i, count);
        if (v0) sum += lambda * load<W>(v0 + i, count);
        store<W>(out + i, sum, count);
      });
}

GAUGEKIT_ROW(combine_row)

// The same where v's row is the one that joins the sum: plain causal attention, each row read once.
template <int W, class A, class S>
GAUGEKIT_INLINE void combine_next_row(S* out, const S* a, A beta, const S* v, A alpha, const A* rounded,
                                      A* recent, A scale, int64_t width) {
  columns<W>(
      width, GAUGEKIT_STEP {
        const Vector<A, W> value = load<W>(v + i, count), sum = load<W>(recent + i, count) + value;
        store<W>(recent + i, sum, count);
        const Vector<A, W> shaped =
            beta * load<W>(a + i, count) - scale * (load<W>(rounded + i, count) + sum);
        store<W>(out + i, shaped + alpha * value, count);
      });
}

// The queries of some chunks of a sequence, for some heads.
template <class S, int W>
GAUGEKIT_INLINE void forward_heads(const Forward<S>& f, const Sequence& s, Span chunks, Span heads) {
  using A = accumulator<S>;
  const Shape& shape = f.shape;
  const int64_t width = shape.width, per_group = shape.heads_of_group(), b = s.batch;
  const int64_t first_group = heads.first / per_group, last_group = (heads.last - 1) / per_group + 1;
  const bool mean = f.gains.has_gamma;
  RunningSum<A, W> sums(mean ? (last_group - first_group) * width : 0, shape.window != 0);
  int64_t added = 0, removed = 0;
  const auto slide = [&](int64_t& end, int64_t to, A sign) __attribute__((always_inline)) {
    for (; end < to; ++end) {
      for (int64_t g = first_group; g < last_group; ++g)
        sums.add((g - first_group) * width, f.v.at(b, g, s.first_key + end), sign, width);
      sums.row_done();
    }
  };
  const bool paired =
      mean && f.gains.has_alpha && !f.gains.has_lambda && shape.causal && !shape.window && per_group == 1;
  for (int64_t c = chunks.first; c < chunks.last; ++c) {
    const Span queries = queries_of_chunk(shape, s, c), chunk_keys = keys_of_chunk(shape, s, c);
    if (mean) {
      const int64_t row = (s.chunks_before + c) * shape.groups + first_group;
      sums.next_chunk(f.sums ? f.sums + row * width : nullptr);
    }
    added = shape.window ? -1 : chunk_keys.first;
    for (int64_t t = queries.first; t < queries.last; ++t) {
      const Span keys = keys_of(shape, s, t);
      const int64_t seen = keys.count(), query = s.first_query + t, p = s.start + t;
      const bool own = p >= 0 && p < s.keys;
      if (paired && own && added == p) {
        for (int64_t h = heads.first; h < heads.last; ++h) {
          const int64_t column = (h - heads.first) * width;
          combine_next_row<W, A, S>(f.out.at(b, h, query), f.a.at(b, h, query), f.gains.beta[h],
                                    f.v.at(b, h, s.first_key + p), f.gains.alpha[h], &sums.rounded[column],
                                    &sums.recent[column], f.gains.gamma[h] / static_cast<A>(seen), width);
        }
        ++added;
        sums.row_done();
        continue;
      }
      if (mean && seen && !shape.open()) {
        if (added < 0) added = removed = keys.first;
        slide(added, keys.last, A(1));
        if (shape.window) slide(removed, keys.first, A(-1));
      }
      for (int64_t h = heads.first; h < heads.last; ++h) {
        const int64_t g = h / per_group, column = (g - first_group) * width;
        const bool value = own && (f.gains.has_alpha || f.gains.has_lambda);
        const bool reference = own && f.gains.has_lambda;
        combine_row_called<W, A, S>(
            f.out.at(b, h, query), seen ? f.a.at(b, h, query) : nullptr, f.gains.beta[h],
            value ? f.v.at(b, g, s.first_key + p) : nullptr, f.gains.alpha[h] - f.gains.lambda[h],
            reference ? f.v0.at(b, g, query) : nullptr, f.gains.lambda[h],
            mean && seen ? &sums.rounded[column] : nullptr, mean && seen ? &sums.recent[column] : nullptr,
            seen ? f.gains.gamma[h] / static_cast<A>(seen) : A(0), width);
      }
    }
    if (mean && !f.sums && !shape.window && queries.last < s.queries) slide(added, chunk_keys.last, A(1));
  }
}

}  // namespace

GAUGEKIT_SWEEP(shaped_combine, forward_heads, Forward)

}  // namespace gaugekit
