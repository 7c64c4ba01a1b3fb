// Gradients of ragged attention: probabilities are computed again from the log-sum-exp, block by block. A
// task is one query head of one sequence; it walks the blocks of keys, so every sum has one order whatever
// the number of threads. Free of torch.
#pragma once

#include "cpu/ragged_attention_forward.h"

namespace gaugekit {

// T is where the gradients of keys and values go: S, or the accumulator's type where query heads share a key
// head and are added up afterwards.
template <class S, class T>
struct RaggedBackward {
  using A = accumulator<S>;
  Shape shape;
  Ranks ranks;
  Rows<const S> grad, q, k, v, out;
  const A* log;  // [B, H, T]
  Rows<S> dq;
  Rows<T> dk, dv;  // a part for each query head: dk's columns as q's, dv [B, H, S, V]
  int64_t queries;
  double scale;
};

template <class S, class T>
void attend_backward(const RaggedBackward<S, T>& f, const Sequence& s, const Sight& sight, int64_t head) {
  using A = accumulator<S>;
  const int64_t group = head / f.ranks.repeats, rank = f.ranks.rank[group], stride = padded<A>(rank);
  const int64_t width = padded<A>(f.shape.width), queries = s.queries, whole = blocks_of(queries) * EDGE;
  const int64_t query_column = f.ranks.query_column(head), key_column = f.ranks.before[group];
  Buffer<A> q(whole * stride), g(whole * width), dq(whole * stride), log(whole), share(whole);
  Buffer<A> k(EDGE * stride), v(EDGE * width), k_turned(rank * EDGE), v_turned(f.shape.width * EDGE);
  Buffer<A> p(EDGE * EDGE), d(EDGE * EDGE), dk(EDGE * stride), dv(EDGE * width), first(EDGE), last(EDGE);
  Buffer<A> ones(EDGE);
  ones.fill(A(1));
  read_lines(Reading<S>{f.q.at(s.batch, 0, s.first_query) + query_column, f.q.stride.row, q.data(), stride,
                        queries, rank, static_cast<A>(f.scale * LOG2_E)});
  read_lines(Reading<S>{f.grad.at(s.batch, head, s.first_query), f.grad.stride.row, g.data(), width, queries,
                        f.shape.width, A(1)});
  std::vector<Glance> glances;
  for (int64_t query = 0; query < queries; query += EDGE) {
    glances.emplace_back(sight.keys, query);
    const int64_t rows = glances.back().count;
    read_lines(Reading<S>{f.out.at(s.batch, head, s.first_query + query), f.out.stride.row, dv.data(), width,
                          rows, f.shape.width, A(1)});
    share_rows(Shares<A>{g.data() + query * width, dv.data(), width, rows, &share[query]});
  }
  const A* logs = f.log + (s.batch * f.shape.heads + head) * f.queries + s.first_query;
  for (int64_t t = 0; t < queries; ++t) log[t] = logs[t] * static_cast<A>(LOG2_E);
  for (int64_t key = 0; key < s.keys; key += EDGE) {
    const int64_t rows = std::min(EDGE, s.keys - key);
    read_lines(Reading<S>{f.k.at(s.batch, 0, s.first_key + key) + key_column, f.k.stride.row, k.data(),
                          stride, rows, rank, A(1)});
    read_lines(Reading<S>{f.v.at(s.batch, group, s.first_key + key), f.v.stride.row, v.data(), width, rows,
                          f.shape.width, A(1)});
    k.fill(A(0), rows * stride);
    turn(k.data(), stride, rows, rank, k_turned.data());
    turn(v.data(), width, rows, f.shape.width, v_turned.data());
    dk.fill(A(0));
    dv.fill(A(0));
    for (size_t block = 0; block < glances.size(); ++block) {
      const Glance& glance = glances[block];
      if (glance.hull.last <= key || glance.hull.first >= key + rows) continue;
      const int64_t query = block * EDGE;
      const bool masked = glance.masks(key);
      if (masked) glance.relative(key, first.data(), last.data());
      const A *q_ = q.data() + query * stride, *g_ = g.data() + query * width;
      multiply(Product<A>{q_, stride, 1, k_turned.data(), EDGE, rank, glance.count, p.data(), nullptr});
      multiply(
          Product<A>{g_, width, 1, v_turned.data(), EDGE, f.shape.width, glance.count, d.data(), nullptr});
      slope(Slopes<A>{p.data(), d.data(), first.data(), last.data(), glance.count, masked, &log[query],
                      &share[query]});
      multiply(Product<A>{d.data(), EDGE, 1, k.data(), stride, EDGE, glance.count, dq.data() + query * stride,
                          ones.data()});
      multiply(Product<A>{p.data(), 1, EDGE, g_, width, glance.count, EDGE, dv.data(), ones.data()});
      multiply(Product<A>{d.data(), 1, EDGE, q_, stride, glance.count, EDGE, dk.data(), ones.data()});
    }
    // q was read scaled, in powers of two.
    write_lines(Writing<T>{f.dk.at(s.batch, 0, s.first_key + key) + query_column, f.dk.stride.row, dk.data(),
                           stride, rows, rank, static_cast<A>(LN_2)});
    write_lines(Writing<T>{f.dv.at(s.batch, head, s.first_key + key), f.dv.stride.row, dv.data(), width, rows,
                           f.shape.width, A(1)});
  }
  write_lines(Writing<S>{f.dq.at(s.batch, 0, s.first_query) + query_column, f.dq.stride.row, dq.data(),
                         stride, queries, rank, static_cast<A>(f.scale)});
}

}  // namespace gaugekit
