// softmax(scale · q kᵀ) v, head by head, each of its own rank: blocks of EDGE queries walk the keys they see
// with running maxima and sums, as FlashAttention does. Free of torch.
#pragma once

#include "cpu/ragged_attention_tile.h"

namespace gaugekit {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

inline int64_t blocks_of(int64_t rows) { return (rows + EDGE - 1) / EDGE; }

// Where heads stand in a row of queries and of keys: one rank a key head, its query heads side by side.
struct Ranks {
  std::vector<int64_t> rank, before;  // of a key head: its channels, and the channels of the key heads before
  int64_t repeats, sum;
  int64_t query_column(int64_t head) const {
    return before[head / repeats] * repeats + head % repeats * rank[head / repeats];
  }
};

// Keys seen by each query of one sequence.
struct Sight {
  std::vector<Span> keys;
  Sight(const Shape& shape, const Sequence& s) : keys(s.queries) {
    for (int64_t t = 0; t < s.queries; ++t) keys[t] = keys_of(shape, s, t);
  }
};

// What EDGE queries from `query` on see of the keys: all of it lies in hull, and the keys in every row's
// sight are whole. Relative to a block of keys, `relative` gives each row's first and last.
struct Glance {
  const Span* rows;
  int64_t count;
  Span hull{0, 0}, whole{0, 0};
  Glance(const std::vector<Span>& keys, int64_t query)
      : rows(keys.data() + query), count(std::min<int64_t>(EDGE, keys.size() - query)) {
    bool any = false;
    whole = count ? rows[0] : Span{0, 0};
    for (int64_t r = 0; r < count; ++r) {
      whole = {std::max(whole.first, rows[r].first), std::min(whole.last, rows[r].last)};
      if (!rows[r].count()) continue;
      hull = any ? Span{std::min(hull.first, rows[r].first), std::max(hull.last, rows[r].last)} : rows[r];
      any = true;
    }
  }
  bool masks(int64_t key) const { return key < whole.first || key + EDGE > whole.last; }
  template <class A>
  void relative(int64_t key, A* first, A* last) const {
    const auto inside = [&](int64_t j) {
      return static_cast<A>(std::min(std::max<int64_t>(j - key, 0), EDGE));
    };
    for (int64_t r = 0; r < count; ++r) first[r] = inside(rows[r].first), last[r] = inside(rows[r].last);
  }
};

template <class S>
struct RaggedForward {
  using A = accumulator<S>;
  Shape shape;  // width: the values'
  Ranks ranks;
  Rows<const S> q, k, v;  // q and k: one head of all channels
  Rows<S> out;
  A* log;  // [B, H, T]
  int64_t queries;
  double scale;
};

// The keys and the values of every block of one sequence's keys, or of a key head in one block, as a form has
// them.
template <class Word>
struct KeyBlocks {
  Word *keys, *values;
};

// A query's row before its first block: a maximum far below any score, and finite, for the difference of two
// of them is 0.
template <class A>
void begin_rows(Buffer<A>& top, Buffer<A>& lanes, Buffer<A>& sums) {
  top.fill(std::numeric_limits<A>::lowest() / 2);
  lanes.fill(A(0));
  sums.fill(A(0));
}

// The rows of a block of queries after their last: weighted sums o [EDGE, padded V] over the sums of the
// weights, and the logarithms of those.
template <class S, class A>
void end_rows(const RaggedForward<S>& f, const Sequence& s, const Glance& glance, int64_t head, int64_t query,
              const A* o, const A* top, const A* sum) {
  const int64_t width = padded<A>(f.shape.width);
  A* log = f.log + (s.batch * f.shape.heads + head) * f.queries + s.first_query + query;
  for (int64_t r = 0; r < glance.count; ++r) {
    const bool blind = !glance.rows[r].count();
    write_lines(Writing<S>{f.out.at(s.batch, head, s.first_query + query + r), 0, o + r * width, width, 1,
                           f.shape.width, blind ? A(0) : 1 / sum[r]});
    log[r] =
        blind ? -std::numeric_limits<A>::infinity() : static_cast<A>(LN_2) * (top[r] + std::log2(sum[r]));
  }
}

template <class A>
struct ForwardScratch {
  Buffer<A> q, p, o, first, last, top, keep, lanes, sum, keys, values;
  ForwardScratch(int64_t rank, int64_t width)
      : q(EDGE * padded<A>(rank)),
        p(EDGE * EDGE),
        o(EDGE * padded<A>(width)),
        first(EDGE),
        last(EDGE),
        top(EDGE),
        keep(EDGE),
        lanes(EDGE * ALIGN / sizeof(A)),
        sum(EDGE),
        keys(rank * EDGE),
        values(EDGE * padded<A>(width)) {}
};

// A block's keys and values: of all that were packed before, or else packed now.
template <class Form, class S>
KeyBlocks<typename Form::Word> block_of(const RaggedForward<S>& f, const Sequence& s, int64_t block,
                                        int64_t group, const KeyBlocks<typename Form::Word>& packed,
                                        typename Form::Scratch& x) {
  if (packed.keys) return Form::place(f, packed, block, group);
  const KeyBlocks<typename Form::Word> own{x.keys.data(), x.values.data()};
  Form::pack(f, s, block, group, own);
  return own;
}

// The forward's blocks in the accumulator's type: keys turned, values as they are.
template <class S>
struct PlainForm {
  using A = accumulator<S>;
  using Word = A;
  using Scratch = ForwardScratch<A>;

  static int64_t key_words(const RaggedForward<S>& f) { return f.ranks.sum * EDGE; }
  static int64_t value_words(const RaggedForward<S>& f) {
    return f.shape.groups * EDGE * padded<A>(f.shape.width);
  }
  static KeyBlocks<A> place(const RaggedForward<S>& f, const KeyBlocks<A>& of, int64_t block, int64_t group) {
    return {of.keys + (block * f.ranks.sum + f.ranks.before[group]) * EDGE,
            of.values + (block * f.shape.groups + group) * EDGE * padded<A>(f.shape.width)};
  }

  static void pack(const RaggedForward<S>& f, const Sequence& s, int64_t block, int64_t group,
                   const KeyBlocks<A>& to) {
    const int64_t key = block * EDGE, rows = std::min(EDGE, s.keys - key), rank = f.ranks.rank[group];
    const int64_t width = padded<A>(f.shape.width), stride = padded<A>(rank);
    Buffer<A> lines(EDGE * stride);
    read_lines(Reading<S>{f.k.at(s.batch, 0, s.first_key + key) + f.ranks.before[group], f.k.stride.row,
                          lines.data(), stride, rows, rank, A(1)});
    turn(lines.data(), stride, rows, rank, to.keys);
    read_lines(Reading<S>{f.v.at(s.batch, group, s.first_key + key), f.v.stride.row, to.values, width, rows,
                          f.shape.width, A(1)});
    std::fill(to.values + rows * width, to.values + EDGE * width, A(0));
  }

  static void attend(const RaggedForward<S>& f, const Sequence& s, const Sight& sight, int64_t head,
                     int64_t query, const KeyBlocks<A>& packed, ForwardScratch<A>& x) {
    const int64_t group = head / f.ranks.repeats, rank = f.ranks.rank[group], stride = padded<A>(rank);
    const int64_t width = padded<A>(f.shape.width);
    const Glance glance(sight.keys, query);
    const int64_t rows = glance.count;
    read_lines(Reading<S>{f.q.at(s.batch, 0, s.first_query + query) + f.ranks.query_column(head),
                          f.q.stride.row, x.q.data(), stride, rows, rank, static_cast<A>(f.scale * LOG2_E)});
    begin_rows(x.top, x.lanes, x.o);
    for (int64_t block = glance.hull.first / EDGE; block * EDGE < glance.hull.last; ++block) {
      const bool masked = glance.masks(block * EDGE);
      if (masked) glance.relative(block * EDGE, x.first.data(), x.last.data());
      const KeyBlocks<A> of = block_of<PlainForm>(f, s, block, group, packed, x);
      multiply(Product<A>{x.q.data(), stride, 1, of.keys, EDGE, rank, rows, x.p.data(), nullptr});
      weigh(Weights<A>{x.p.data(), x.first.data(), x.last.data(), rows, masked, x.top.data(), x.keep.data(),
                       x.lanes.data()});
      multiply(Product<A>{x.p.data(), EDGE, 1, of.values, width, EDGE, rows, x.o.data(), x.keep.data()});
    }
    add_lanes(Lanes<A>{x.lanes.data(), rows, x.sum.data()});
    end_rows(f, s, glance, head, query, x.o.data(), x.top.data(), x.sum.data());
  }
};

}  // namespace gaugekit
