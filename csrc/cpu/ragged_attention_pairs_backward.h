// Gradients of ragged attention in bfloat16 by products of pairs: the walk of ragged_attention_backward.h.
// Probabilities and the slopes of the scores are rounded to bfloat16 before they are multiplied, sums are
// not. Free of torch.
#pragma once

#include "cpu/ragged_attention_backward.h"
#include "cpu/ragged_attention_pairs.h"

#ifdef GAUGEKIT_X86
namespace gaugekit {

// Slopes of scores that are not scaled yet; rows from of.rows on become zeros up to the next even one. What
// becomes of them are words: probabilities p and slopes d_rows [PAIRS, EDGE] of neighbouring queries, slopes
// d [EDGE, PAIRS] of neighbouring keys.
struct PairSlopes {
  Slopes<float> of;
  float scale;
  Words *p, *d, *d_rows;
};

// Words of neighbouring rows, of sixteen columns.
GAUGEKIT_BF16_INLINE __m512i beside(__m512 upper, __m512 lower) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, as_words(_mm512_cvtne2ps_pbh(lower, upper)));
}

GAUGEKIT_BF16 inline void slope_pairs(const PairSlopes& given) {
  const Slopes<float> f = given.of;
  const __m512 scale = _mm512_set1_ps(given.scale);
  constexpr int COUNT = EDGE / LANES;
  for (int64_t row = 0; row < f.rows; row += 2) {
    __m512 p[2][COUNT], d[2][COUNT];
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + half;
      const bool there = r < f.rows;
      const __m512 log = _mm512_set1_ps(there ? f.log[r] : 0), share = _mm512_set1_ps(there ? f.share[r] : 0);
#pragma GCC unroll 3
      for (int i = 0; i < COUNT; ++i) {
        const int64_t at = r * EDGE + i * LANES;
        const __mmask16 keys = !there     ? 0
                               : f.masked ? seen(i * LANES, f.first[r], f.last[r])
                                          : static_cast<__mmask16>(-1);
        const __m512 x = two_to_the(_mm512_fmsub_ps(scale, _mm512_load_ps(f.p + at), log));
        p[half][i] = _mm512_maskz_mov_ps(keys, x);
        d[half][i] = _mm512_maskz_mul_ps(keys, x, _mm512_sub_ps(_mm512_load_ps(f.d + at), share));
      }
      Words* to = given.d + r * PAIRS;
      _mm512_storeu_si512(to, as_words(_mm512_cvtne2ps_pbh(d[half][1], d[half][0])));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + LANES),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(d[half][2])));
    }
#pragma GCC unroll 3
    for (int i = 0; i < COUNT; ++i) {
      const int64_t at = row / 2 * EDGE + i * LANES;
      _mm512_store_si512(given.p + at, beside(p[0][i], p[1][i]));
      _mm512_store_si512(given.d_rows + at, beside(d[0][i], d[1][i]));
    }
  }
}

// What a task reads of its head again and again: queries and gradients, both ways, and numbers of each query.
struct PairQueries {
  int64_t whole, stride, width;  // of rows: all blocks; words: of a query's channels, of a gradient's columns
  int64_t channels, columns;     // numbers, padded to registers
  Buffer<Words> q, q_rows, g, g_rows;
  Buffer<float> log, share;
  PairQueries(int64_t queries, int64_t rank, int64_t values)
      : whole(blocks_of(queries) * EDGE),
        stride(padded<Words>(pairs_of(rank))),
        width(padded<Words>(pairs_of(values))),
        channels(padded<float>(rank)),
        columns(padded<float>(values)),
        q(whole * stride),
        q_rows(whole / 2 * channels),
        g(whole * width),
        g_rows(whole / 2 * columns),
        log(whole),
        share(whole) {}
};

template <class S, class T>
void read_queries(const RaggedBackward<S, T>& f, const Sequence& s, int64_t head,
                  const std::vector<Glance>& all, PairQueries& to) {
  const int64_t group = head / f.ranks.repeats, width = f.shape.width;
  const PairSource q{f.q.at(s.batch, 0, s.first_query) + f.ranks.query_column(head), f.q.stride.row,
                     s.queries, f.ranks.rank[group]};
  const PairSource g{f.grad.at(s.batch, head, s.first_query), f.grad.stride.row, s.queries, width};
  pair_columns(q, to.q.data(), to.stride);
  pair_rows(q, to.q_rows.data(), to.channels, to.whole);
  pair_columns(g, to.g.data(), to.width);
  pair_rows(g, to.g_rows.data(), to.columns, to.whole);
  Buffer<float> slope(EDGE * to.columns), out(EDGE * to.columns);
  for (size_t block = 0; block < all.size(); ++block) {
    const int64_t query = block * EDGE, rows = all[block].count;
    const auto read = [&](const Rows<const S>& from, Buffer<float>& lines) {
      read_lines(Reading<S>{from.at(s.batch, head, s.first_query + query), from.stride.row, lines.data(),
                            to.columns, rows, width, 1.0f});
    };
    read(f.grad, slope), read(f.out, out);
    share_rows(Shares<float>{slope.data(), out.data(), to.columns, rows, &to.share[query]});
  }
  const float* logs = f.log + (s.batch * f.shape.heads + head) * f.queries + s.first_query;
  for (int64_t t = 0; t < s.queries; ++t) to.log[t] = logs[t] * static_cast<float>(LOG2_E);
}

// What a task needs beside one block of keys.
struct PairKeys {
  Buffer<Words> keys, key_rows, values, p, d, d_rows;
  Buffer<float> scores, slopes, dk, dv, first, last, ones;
  PairKeys(int64_t rank, int64_t values_wide, const PairQueries& x)
      : keys(pairs_of(rank) * EDGE),
        key_rows(PAIRS * x.channels),
        values(pairs_of(values_wide) * EDGE),
        p(PAIRS * EDGE),
        d(EDGE * PAIRS),
        d_rows(PAIRS * EDGE),
        scores(EDGE * EDGE),
        slopes(EDGE * EDGE),
        dk(EDGE * x.channels),
        dv(EDGE * x.columns),
        first(EDGE),
        last(EDGE),
        ones(EDGE) {
    ones.fill(1);
  }
};

// One block of keys beside one of queries: adds to dq, dk and dv.
inline void slope_block(const PairQueries& x, PairKeys& y, const Glance& glance, int64_t query, int64_t key,
                        int64_t rank, int64_t width, float scale, Buffer<float>& dq) {
  const int64_t rows = glance.count;
  const bool masked = glance.masks(key);
  if (masked) glance.relative(key, y.first.data(), y.last.data());
  const auto at = [&](const Buffer<Words>& of, int64_t first) { return of.data() + first; };
  const float* ones = y.ones.data();
  multiply_pairs({at(x.q, query * x.stride), x.stride, 1, y.keys.data(), EDGE, pairs_of(rank), rows,
                  y.scores.data(), nullptr});
  multiply_pairs({at(x.g, query * x.width), x.width, 1, y.values.data(), EDGE, pairs_of(width), rows,
                  y.slopes.data(), nullptr});
  slope_pairs({{y.scores.data(), y.slopes.data(), y.first.data(), y.last.data(), rows, masked,
                x.log.data() + query, x.share.data() + query},
               scale,
               y.p.data(),
               y.d.data(),
               y.d_rows.data()});
  multiply_pairs({y.d.data(), PAIRS, 1, y.key_rows.data(), x.channels, PAIRS, rows,
                  dq.data() + query * x.channels, ones});
  multiply_pairs({y.p.data(), 1, EDGE, at(x.g_rows, query / 2 * x.columns), x.columns, pairs_of(rows), EDGE,
                  y.dv.data(), ones});
  multiply_pairs({y.d_rows.data(), 1, EDGE, at(x.q_rows, query / 2 * x.channels), x.channels, pairs_of(rows),
                  EDGE, y.dk.data(), ones});
}

template <class S, class T>
void attend_backward_pairs(const RaggedBackward<S, T>& f, const Sequence& s, const Sight& sight,
                           int64_t head) {
  const int64_t group = head / f.ranks.repeats, rank = f.ranks.rank[group], width = f.shape.width;
  const int64_t query_column = f.ranks.query_column(head);
  std::vector<Glance> glances;
  for (int64_t query = 0; query < s.queries; query += EDGE) glances.emplace_back(sight.keys, query);
  PairQueries x(s.queries, rank, width);
  read_queries(f, s, head, glances, x);
  PairKeys y(rank, width, x);
  Buffer<float> dq(x.whole * x.channels);
  for (int64_t key = 0; key < s.keys; key += EDGE) {
    const int64_t rows = std::min(EDGE, s.keys - key);
    const PairSource k{f.k.at(s.batch, 0, s.first_key + key) + f.ranks.before[group], f.k.stride.row, rows,
                       rank};
    turn_pairs(k, y.keys.data());
    pair_rows(k, y.key_rows.data(), x.channels, EDGE);
    turn_pairs({f.v.at(s.batch, group, s.first_key + key), f.v.stride.row, rows, width}, y.values.data());
    y.dk.fill(0);
    y.dv.fill(0);
    for (size_t block = 0; block < glances.size(); ++block) {
      if (glances[block].hull.last <= key || glances[block].hull.first >= key + rows) continue;
      slope_block(x, y, glances[block], block * EDGE, key, rank, width, static_cast<float>(f.scale * LOG2_E),
                  dq);
    }
    const auto scale = static_cast<float>(f.scale);
    write_lines(Writing<T>{f.dk.at(s.batch, 0, s.first_key + key) + query_column, f.dk.stride.row,
                           y.dk.data(), x.channels, rows, rank, scale});
    write_lines(Writing<T>{f.dv.at(s.batch, head, s.first_key + key), f.dv.stride.row, y.dv.data(), x.columns,
                           rows, width, 1.0f});
  }
  write_lines(Writing<S>{f.dq.at(s.batch, 0, s.first_query) + query_column, f.dq.stride.row, dq.data(),
                         x.channels, s.queries, rank, static_cast<float>(f.scale)});
}

}  // namespace gaugekit
#endif
