// Attention from one cache on one split of a sequence's rows, and the sums of the splits. Free of torch.
#pragma once

#include "cpu/ragged_attention_forward.h"
#include "cpu/single_cache_attention_tile.h"

namespace gaugekit {

constexpr int64_t SPLIT = 10 * EDGE;  // rows of the cache; fixed, so that no bit depends on threads or batch

// Queries [first, first + count) of all heads of one group: one item, whose splits are pieces of work.
struct Queries {
  int64_t batch, group, first, count;
  Span seen;      // all of what they see lies in it
  int64_t start;  // the position of the sequence's first query
  int64_t keys;   // of the sequence
  int64_t place;  // of its parts
  std::vector<Span> keys_of;
  int64_t first_split() const { return seen.first / SPLIT; }
  int64_t splits() const { return seen.count() ? (seen.last - 1) / SPLIT + 1 - first_split() : 0; }
};

// What a split leaves: sums of `rows` query rows, `wide` apart, and of `means` rows of the uniform attention,
// `whole` apart, then the maxima and the totals of both.
struct Part {
  int64_t rows, means, wide, whole, size;
  int64_t mean() const { return rows * wide; }
  int64_t top() const { return mean() + means * whole; }
  int64_t total() const { return top() + rows + means; }
};

struct ScratchSizes {
  int64_t rows, width;   // query rows and uniform rows together, numbers of a row of the cache
  int64_t values, keys;  // numbers of a block's rows and of its keys, 0 where they are read where they lie
};

struct SplitOperands {
  Shape shape;      // width: the cache's
  int64_t width;    // of the values
  int64_t queries;  // of a sequence
  double scale;
  const int32_t* table = nullptr;
  int64_t table_row = 0, page = 0, pairs = 0;

  int64_t repeats() const { return shape.heads / shape.groups; }
  bool slices() const { return width != shape.width; }
  int64_t queries_of_item() const { return std::max<int64_t>(1, std::min(queries, EDGE / repeats())); }
};

template <class S>
struct CacheSplit : SplitOperands {
  using A = accumulator<S>;
  Rows<const S> q, cache;
  Rows<S> out;
  std::vector<A> alpha, beta, gamma, key_gain;
  const A *cos = nullptr, *sin = nullptr;
  A* parts = nullptr;

  const S* row(const Queries& of, int64_t j) const {
    if (!table) return cache.at(of.batch, of.group, j);
    return cache.at(table[of.batch * table_row + j / page], of.group, j % page);
  }
  // The rows of a block from `first` on that some query may see, as places in it; what stands for one of the
  // others has weight 0, and has to be a number.
  static Span seen_in(const Queries& of, int64_t first, int64_t count) {
    return {std::max<int64_t>(0, of.seen.first - first), count};
  }
  // Rows from j on that stand one distance apart in memory.
  int64_t run(int64_t j) const { return table ? page - j % page : std::numeric_limits<int64_t>::max(); }
  // Rows are multiplied where they lie: no conversion, no turn, no register that is not full.
  bool direct() const {
    return std::is_same_v<S, A> && !cos && padded<A>(shape.width) == shape.width && padded<A>(width) == width;
  }
  Queries item(const Sequence& s, int64_t group, int64_t first, int64_t place) const {
    Queries of{s.batch, group, first, std::min(queries_of_item(), s.queries - first), {0, 0}, s.start,
               s.keys,  place, {}};
    for (int64_t t = first; t < first + of.count; ++t) {
      const Span keys = gaugekit::keys_of(shape, s, t);
      of.keys_of.push_back(keys);
      if (!keys.count()) continue;
      of.seen = !of.seen.count()
                    ? keys
                    : Span{std::min(of.seen.first, keys.first), std::max(of.seen.last, keys.last)};
    }
    return of;
  }
  Part part(const Queries& of) const {
    Part p{repeats() * of.count, gamma.empty() ? 0 : of.count, padded<A>(width), padded<A>(shape.width), 0};
    p.size = padded<A>(p.total() + p.rows + p.means);
    return p;
  }
  ScratchSizes scratch() const {
    const int64_t rows = (repeats() + (gamma.empty() ? 0 : 1)) * queries_of_item();
    const int64_t block =
        EDGE * padded<A>(shape.width) + ALIGN;  // a head's last columns may be read past its row
    return {rows, padded<A>(shape.width), direct() ? 0 : block, cos ? block : 0};
  }
};

// What the softmax of a block's rows needs, whatever multiplies them; squares of EDGE rows beside EDGE keys.
template <class A>
struct SplitRows {
  int64_t squares;
  Buffer<A> p, first, last, top, keep, lanes;
  std::vector<const char*> next;  // rows of the block after this one
  explicit SplitRows(ScratchSizes s)
      : squares(s.rows / EDGE + 1),
        p(squares * EDGE * EDGE),
        first(squares * EDGE),
        last(squares * EDGE),
        top(squares * EDGE),
        keep(squares * EDGE),
        lanes(squares * EDGE * ALIGN / sizeof(A)),
        next(EDGE) {}
  // The square whose first row is r.
  Weights<A> square(const Part& part, int64_t r, bool masked) {
    return {p.data() + r * EDGE,
            first.data() + r,
            last.data() + r,
            std::min(EDGE, part.rows + part.means - r),
            masked,
            top.data() + r,
            keep.data() + r,
            lanes.data() + r * (ALIGN / sizeof(A))};
  }
};

template <class A>
struct SplitScratch : SplitRows<A> {
  Buffer<A> q, values, keys;
  std::vector<const A*> value_rows, key_rows;
  explicit SplitScratch(ScratchSizes s)
      : SplitRows<A>(s),
        q(s.rows * s.width),
        values(s.values),
        keys(s.keys),
        value_rows(EDGE),
        key_rows(EDGE) {}
};

// Where the rows of the next block are; behind the last one, this block's.
template <class S>
void fetch_rows(const CacheSplit<S>& f, const Queries& of, int64_t first, int64_t count,
                SplitRows<accumulator<S>>& x) {
  for (int64_t j = 0; j < EDGE; ++j) {
    const int64_t ahead = first + EDGE + j, here = first + f.seen_in(of, first, count).nearest(j);
    x.next[j] = reinterpret_cast<const char*>(f.row(of, ahead < of.seen.last ? ahead : here));
  }
}

// What each row sees of the block; whether that is less than all. The uniform attention's scores are 0.
template <class A>
bool see_rows(const Queries& of, const Part& part, int64_t first, int64_t count, SplitRows<A>& x) {
  bool masked = count < EDGE;
  for (int64_t r = 0; r < part.rows + part.means; ++r) {
    const Span keys = of.keys_of[r % of.count];
    const auto inside = [&](int64_t j) {
      return static_cast<A>(std::min(std::max<int64_t>(j - first, 0), count));
    };
    x.first[r] = inside(keys.first), x.last[r] = inside(keys.last);
    masked = masked || keys.first > first || keys.last < first + count;
    if (r >= part.rows) std::fill_n(x.p.data() + r * EDGE, EDGE, A(0));
  }
  return masked;
}

// A split's blocks in the accumulator's type.
template <class S>
struct PlainBlocks {
  using A = accumulator<S>;
  using Split = CacheSplit<S>;
  using Scratch = SplitScratch<A>;

  static void read_queries(const Split& f, const Queries& of, Scratch& x) {
    const int64_t width = padded<A>(f.shape.width);
    for (int64_t h = 0; h < f.repeats(); ++h)
      read_lines(Reading<S>{f.q.at(of.batch, of.group * f.repeats() + h, of.first), f.q.stride.row,
                            x.q.data() + h * of.count * width, width, of.count, f.shape.width,
                            static_cast<A>(f.scale * LOG2_E)});
  }

  // Rows that are not multiplied as they lie are brought into the scratch.
  static void read_block(const Split& f, const Queries& of, int64_t first, int64_t count, Scratch& x) {
    const int64_t width = padded<A>(f.shape.width);
    const Span seen = f.seen_in(of, first, count);
    fetch_rows(f, of, first, count, x);
    if constexpr (std::is_same_v<S, A>)
      for (int64_t j = 0; j < EDGE; ++j) x.value_rows[j] = x.key_rows[j] = f.row(of, first + seen.nearest(j));
    if (f.direct()) return;
    for (int64_t j = seen.first; j < count;) {
      const int64_t rows = std::min(f.run(first + j), count - j);
      read_lines(Reading<S>{f.row(of, first + j), f.cache.stride.row, x.values.data() + j * width, width,
                            rows, f.shape.width, A(1)});
      j += rows;
    }
    if (f.cos) {
      const int64_t at = seen.first * width, angle = (first + seen.first) * f.pairs;
      turn_keys(Turning<A>{x.values.data() + at, x.keys.data() + at, width, f.shape.width / 2, f.pairs,
                           seen.count(), f.key_gain.empty() ? nullptr : f.key_gain.data(), f.cos + angle,
                           f.sin + angle, f.pairs, f.pairs});
    }
    for (int64_t j = 0; j < EDGE; ++j) {
      const int64_t at = seen.nearest(j) * width;
      x.value_rows[j] = x.values.data() + at;
      x.key_rows[j] = (f.cos ? x.keys : x.values).data() + at;
    }
  }

  // Scores to the softmax's numerators, for all rows.
  static void weigh_block(const Split& f, const Queries& of, const Part& part, int64_t first, int64_t count,
                          Scratch& x) {
    score(Scores<A>{x.q.data(), part.rows, padded<A>(f.shape.width), x.key_rows.data(), count, x.p.data(),
                    x.next.data(), int64_t(f.shape.width * sizeof(S))});
    const bool masked = see_rows(of, part, first, count, x);
    for (int64_t r = 0; r < part.rows + part.means; r += EDGE) weigh(x.square(part, r, masked));
  }

  static void add_block(const Split& f, const Queries& of, const Part& part, int64_t count, A* to,
                        Scratch& x) {
    const auto sums = [&](int64_t row, int64_t rows, int64_t column, int64_t width, A* sums_to,
                          int64_t step) {
      add_weighted(WeightedSums<A>{x.p.data() + row * EDGE, x.keep.data() + row, rows, x.value_rows.data(),
                                   column, width, count, sums_to, step});
    };
    // A head's slice of the rows is still near when its mean is taken, where slices fill whole registers.
    const bool together = f.slices() && part.wide == f.width;
    for (int64_t h = 0; h < (f.slices() ? f.repeats() : 0); ++h) {
      sums(h * of.count, of.count, h * f.width, part.wide, to + h * of.count * part.wide, part.wide);
      if (part.means && together)
        sums(part.rows, part.means, h * f.width, part.wide, to + part.mean() + h * f.width, part.whole);
    }
    if (!f.slices()) sums(0, part.rows, 0, part.wide, to, part.wide);
    if (part.means && !together) sums(part.rows, part.means, 0, part.whole, to + part.mean(), part.whole);
  }
};

// Split `index` of an item: every block's scores, weights and weighted sums. Blocks: how they are multiplied.
template <class Blocks, class S>
void attend_split(const CacheSplit<S>& f, const Queries& of, int64_t index, typename Blocks::Scratch& x) {
  using A = accumulator<S>;
  const Part part = f.part(of);
  A* to = f.parts + of.place + index * part.size;
  std::fill_n(to, part.top(), A(0));
  // Far below any score, and finite: the difference of two of them is 0.
  x.top.fill(std::numeric_limits<A>::lowest() / 2);
  x.lanes.fill(A(0));
  Blocks::read_queries(f, of, x);
  const int64_t begin = (of.first_split() + index) * SPLIT, end = std::min(begin + SPLIT, of.seen.last);
  for (int64_t j = std::max(begin, of.seen.first / EDGE * EDGE); j < end; j += EDGE) {
    const int64_t count = std::min(EDGE, end - j);
    Blocks::read_block(f, of, j, count, x);
    Blocks::weigh_block(f, of, part, j, count, x);
    Blocks::add_block(f, of, part, count, to, x);
  }
  std::copy_n(x.top.data(), part.rows + part.means, to + part.top());
  for (int64_t r = 0; r < part.rows + part.means; r += EDGE)
    add_lanes(Lanes<A>{x.lanes.data() + r * (ALIGN / sizeof(A)), std::min(EDGE, part.rows + part.means - r),
                       to + part.total() + r});
}

// The sum over the splits of `width` numbers of row r, which stand at `from` in each part; over its total.
template <class A>
void add_splits(const A* parts, const Part& part, int64_t splits, int64_t r, int64_t from, int64_t width,
                std::vector<A>& weight, A* to) {
  const A* top = parts + part.top() + r;
  A most = top[0], total = 0;
  for (int64_t s = 1; s < splits; ++s) most = std::max(most, top[s * part.size]);
  weight.resize(splits);
  for (int64_t s = 0; s < splits; ++s) {
    weight[s] = std::exp2(top[s * part.size] - most);
    total += weight[s] * parts[s * part.size + part.total() + r];
  }
  for (int64_t s = 0; s < splits; ++s) weight[s] /= total;
  std::fill_n(to, padded<A>(width), A(0));
  add_parts_of(Parts<A>{parts + from, part.size, splits, weight.data(), to, padded<A>(width)});
}

// β·A + α·v − γ·C for the queries of an item, from what its splits left.
template <class S>
void combine_splits(const CacheSplit<S>& f, const Queries& of) {
  using A = accumulator<S>;
  const Part part = f.part(of);
  const A* parts = f.parts + of.place;
  Buffer<A> sum(padded<A>(f.width)), mean(part.whole + ALIGN), own(padded<A>(f.width));
  std::vector<A> weight;
  for (int64_t t = 0; t < of.count; ++t) {
    const bool blind = !of.keys_of[t].count();
    const int64_t position = of.start + of.first + t;
    const bool present = 0 <= position && position < of.keys && !f.alpha.empty();
    if (part.means && !blind)
      add_splits(parts, part, of.splits(), part.rows + t, part.mean() + t * part.whole, f.shape.width, weight,
                 mean.data());
    for (int64_t i = 0; i < f.repeats(); ++i) {
      const int64_t head = of.group * f.repeats() + i, r = i * of.count + t;
      const int64_t column = f.slices() ? i * f.width : 0;
      sum.fill(A(0));
      if (!blind) add_splits(parts, part, of.splits(), r, r * part.wide, f.width, weight, sum.data());
      if (!blind && !f.beta.empty())
        for (int64_t c = 0; c < f.width; ++c) sum[c] *= f.beta[head];
      if (part.means && !blind)
        for (int64_t c = 0; c < f.width; ++c) sum[c] -= f.gamma[head] * mean[column + c];
      if (present) {
        read_lines(
            Reading<S>{f.row(of, position) + column, 0, own.data(), padded<A>(f.width), 1, f.width, A(1)});
        for (int64_t c = 0; c < f.width; ++c) sum[c] += f.alpha[head] * own[c];
      }
      write_lines(Writing<S>{f.out.at(of.batch, head, of.first + t), 0, sum.data(), padded<A>(f.width), 1,
                             f.width, A(1)});
    }
  }
}

}  // namespace gaugekit
