// Ragged attention in bfloat16 by products of pairs: the walk of ragged_attention_forward.h. Queries are not
// scaled before they are multiplied, which would round them again; the softmax's numerators are rounded to
// bfloat16, its sums are not. Free of torch.
#pragma once

#include "cpu/ragged_attention_forward.h"
#include "cpu/ragged_attention_pairs.h"

#ifdef GAUGEKIT_X86
namespace gaugekit {

inline int64_t padded_words(int64_t words) { return padded<Words>(words); }

struct PairScratch {
  Buffer<Words> q, p, keys, values;
  Buffer<float> scores, o, first, last, top, keep, lanes, sum;
  PairScratch(int64_t rank, int64_t width)
      : q(EDGE * padded_words(pairs_of(rank))),
        p(EDGE * PAIRS),
        keys(pairs_of(rank) * EDGE),
        values(PAIRS * padded_words(width)),
        scores(EDGE * EDGE),
        o(EDGE * padded<float>(width)),
        first(EDGE),
        last(EDGE),
        top(EDGE),
        keep(EDGE),
        lanes(EDGE * LANES),
        sum(EDGE) {}
};

// The forward's blocks as words: keys turned, values paired along the keys.
struct PairForm {
  using Word = Words;
  using Scratch = PairScratch;

  // Words of one pair of channels before a key head: an odd rank leaves half a word.
  static int64_t pairs_before(const Ranks& r, int64_t group) { return (r.before[group] + group) / 2; }
  static int64_t key_words(const RaggedForward<BFloat16>& f) {
    return (f.ranks.sum + f.shape.groups) / 2 * EDGE;
  }
  static int64_t value_words(const RaggedForward<BFloat16>& f) {
    return f.shape.groups * PAIRS * padded_words(f.shape.width);
  }
  static KeyBlocks<Words> place(const RaggedForward<BFloat16>& f, const KeyBlocks<Words>& of, int64_t block,
                                int64_t group) {
    return {of.keys + block * key_words(f) + pairs_before(f.ranks, group) * EDGE,
            of.values + (block * f.shape.groups + group) * PAIRS * padded_words(f.shape.width)};
  }

  static void pack(const RaggedForward<BFloat16>& f, const Sequence& s, int64_t block, int64_t group,
                   const KeyBlocks<Words>& to) {
    const int64_t key = block * EDGE, rows = std::min(EDGE, s.keys - key);
    turn_pairs({f.k.at(s.batch, 0, s.first_key + key) + f.ranks.before[group], f.k.stride.row, rows,
                f.ranks.rank[group]},
               to.keys);
    pair_rows({f.v.at(s.batch, group, s.first_key + key), f.v.stride.row, rows, f.shape.width}, to.values,
              padded_words(f.shape.width), EDGE);
  }

  static void attend(const RaggedForward<BFloat16>& f, const Sequence& s, const Sight& sight, int64_t head,
                     int64_t query, const KeyBlocks<Words>& packed, PairScratch& x) {
    const int64_t group = head / f.ranks.repeats, pairs = pairs_of(f.ranks.rank[group]);
    const int64_t stride = padded_words(pairs), width = padded<float>(f.shape.width);
    const Glance glance(sight.keys, query);
    const int64_t rows = glance.count;
    pair_columns({f.q.at(s.batch, 0, s.first_query + query) + f.ranks.query_column(head), f.q.stride.row,
                  rows, f.ranks.rank[group]},
                 x.q.data(), stride);
    begin_rows(x.top, x.lanes, x.o);
    for (int64_t block = glance.hull.first / EDGE; block * EDGE < glance.hull.last; ++block) {
      const bool masked = glance.masks(block * EDGE);
      if (masked) glance.relative(block * EDGE, x.first.data(), x.last.data());
      const KeyBlocks<Words> of = block_of<PairForm>(f, s, block, group, packed, x);
      multiply_pairs({x.q.data(), stride, 1, of.keys, EDGE, pairs, rows, x.scores.data(), nullptr});
      weigh_pairs({{x.scores.data(), x.first.data(), x.last.data(), rows, masked, x.top.data(), x.keep.data(),
                    x.lanes.data()},
                   static_cast<float>(f.scale * LOG2_E),
                   x.p.data()});
      multiply_pairs({x.p.data(), PAIRS, 1, of.values, width, PAIRS, rows, x.o.data(), x.keep.data()});
    }
    add_lanes(Lanes<float>{x.lanes.data(), rows, x.sum.data()});
    end_rows(f, s, glance, head, query, x.o.data(), x.top.data(), x.sum.data());
  }
};

}  // namespace gaugekit
#endif
