// gaugekit::ragged_attention and its backward on the CPU.

#include <tuple>

#include "cpu/ragged_attention_backward.h"
#include "cpu/ragged_attention_pairs_backward.h"
#include "cpu/ragged_attention_pairs_forward.h"
#include "cpu/shaped_combine_tensors.h"

namespace gaugekit {
namespace {

using torch::stable::parallel_for;

struct RaggedArguments {
  const Tensor &q, &k, &v;
  const std::vector<int64_t>& rank;
  bool causal;
  const std::optional<int64_t>& window;
  const Optional &query_start, &key_lengths, &cu_seqlens;

  Ranks ranks() const {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 4,
                    "q, k, v: expected [B, T, ·], [B, S, ΣR] and [B, G, S, V]");
    STD_TORCH_CHECK(int64_t(rank.size()) == v.size(1) && v.size(1) > 0, "ranks: expected one a key head");
    Ranks r{rank, {}, 0, 0};
    for (int64_t one : rank) {
      STD_TORCH_CHECK(one > 0, "ranks: expected positive numbers");
      r.before.push_back(r.sum);
      r.sum += one;
    }
    check_shape("k", k, {v.size(0), v.size(2), r.sum});
    STD_TORCH_CHECK(q.size(0) == v.size(0) && q.size(2) > 0 && q.size(2) % r.sum == 0,
                    "q: expected [B, T, a multiple of ΣR]");
    check_dtype("q", q, v.scalar_type());
    check_dtype("k", k, v.scalar_type());
    STD_TORCH_CHECK(!window || *window > 0, "window: expected a positive number");
    r.repeats = q.size(2) / r.sum;
    return r;
  }
  Shape shape(const Ranks& r) const {
    return {v.size(1) * r.repeats, v.size(1), v.size(3), causal, window ? std::min(*window, FAR) : 0};
  }
  std::vector<Sequence> sequences(const Shape& shape) const {
    return gaugekit::sequences(shape, q.size(0), q.size(1), v.size(2), query_start, key_lengths, cu_seqlens);
  }
};

// [B, rows, channels] as rows of one head.
template <class S>
Rows<S> one_head(const Tensor& x) {
  return {static_cast<S*>(const_cast<void*>(x.const_data_ptr())), {x.stride(0), 0, x.stride(1)}};
}

ScalarType accumulated(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A block of EDGE queries or keys of one sequence; `before`: blocks of all sequences before.
struct Block {
  int64_t sequence, index, before;
};

std::vector<Block> blocks(const std::vector<Sequence>& all, bool keys) {
  std::vector<Block> found;
  for (size_t s = 0; s < all.size(); ++s) {
    const int64_t before = found.size(), count = blocks_of(keys ? all[s].keys : all[s].queries);
    for (int64_t i = 0; i < count; ++i) {
      // Under a causal mask late queries see most: early and late ones take turns, so that any run of
      // neighbours is about as much work as another.
      const int64_t index = keys ? i : i % 2 ? count - 1 - i / 2 : i / 2;
      found.push_back({static_cast<int64_t>(s), index, before});
    }
  }
  return found;
}

std::vector<Sight> sights(const Shape& shape, const std::vector<Sequence>& all) {
  std::vector<Sight> found;
  for (const Sequence& s : all) found.emplace_back(shape, s);
  return found;
}

// Form: how blocks lie, and what multiplies them.
template <class Form, class S>
void forward_into(const RaggedForward<S>& f, const std::vector<Sequence>& all, const Tensor& like) {
  using Word = typename Form::Word;
  const std::vector<Block> key_blocks = blocks(all, true), query_blocks = blocks(all, false);
  const std::vector<Sight> seen = sights(f.shape, all);
  const int64_t key_size = Form::key_words(f), value_size = Form::value_words(f), groups = f.shape.groups;
  // Where only one block of queries comes to a block of keys, it packs that block for itself, beside it.
  const bool packs = f.ranks.repeats > 1 || query_blocks.size() > all.size();
  const int64_t count = packs ? key_blocks.size() : 0;
  const Tensor packed = torch::stable::new_empty(like, {count * (key_size + value_size)},
                                                 std::make_optional(accumulated(like)));
  static_assert(sizeof(Word) == sizeof(accumulator<S>));
  Word* memory = static_cast<Word*>(packed.mutable_data_ptr());
  std::vector<KeyBlocks<Word>> of_sequence(all.size(), {nullptr, nullptr});
  if (packs)
    for (const Block& b : key_blocks)
      of_sequence[b.sequence] = {memory + b.before * key_size,
                                 memory + count * key_size + b.before * value_size};
  parallel_for(0, count * groups, 4, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const Block& b = key_blocks[begin / groups];
      const int64_t group = begin % groups;
      Form::pack(f, all[b.sequence], b.index, group, Form::place(f, of_sequence[b.sequence], b.index, group));
    }
  });
  const int64_t each = query_blocks.size(),
                widest = *std::max_element(f.ranks.rank.begin(), f.ranks.rank.end());
  parallel_for(0, each * f.shape.heads, 1, [&](int64_t begin, int64_t end) {
    typename Form::Scratch scratch(widest, f.shape.width);
    for (; begin < end; ++begin) {
      const Block& b = query_blocks[begin % each];
      Form::attend(f, all[b.sequence], seen[b.sequence], begin / each, b.index * EDGE,
                   of_sequence[b.sequence], scratch);
    }
  });
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::vector<int64_t> rank, bool causal,
                                   std::optional<int64_t> window, Optional query_start, Optional key_lengths,
                                   Optional cu_seqlens, double scale) {
  const RaggedArguments arguments{q, k, v, rank, causal, window, query_start, key_lengths, cu_seqlens};
  const Ranks ranks = arguments.ranks();
  const Shape shape = arguments.shape(ranks);
  const std::vector<Sequence> all = arguments.sequences(shape);
  // O lies as [B, T, H, V], so that joining the heads copies nothing.
  const Tensor out = torch::stable::transpose(
      torch::stable::new_empty(q, {q.size(0), q.size(1), shape.heads, shape.width}), 1, 2);
  const Tensor log =
      torch::stable::new_empty(q, {q.size(0), shape.heads, q.size(1)}, std::make_optional(accumulated(q)));
  if (log.numel() == 0) return {out, log};
  const Tensor q_ = with_contiguous_rows(q), k_ = with_contiguous_rows(k), v_ = with_contiguous_rows(v);
  dispatch(q.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using A = accumulator<S>;
    const RaggedForward<S> f{shape,
                             ranks,
                             one_head<const S>(q_),
                             one_head<const S>(k_),
                             rows<const S>(v_),
                             rows<S>(out),
                             static_cast<A*>(log.mutable_data_ptr()),
                             q.size(1),
                             scale};
#ifdef GAUGEKIT_X86
    if constexpr (std::is_same_v<S, BFloat16>)
      if (isa() >= Isa::bf16) return forward_into<PairForm>(f, all, q);
#endif
    forward_into<PlainForm<S>>(f, all, q);
  });
  return {out, log};
}

template <class S, class T>
void backward_into(const RaggedBackward<S, T>& f, const Shape& shape, const std::vector<Sequence>& all) {
  const std::vector<Sight> seen = sights(shape, all);
  const auto each = [&](const auto& attend) {
    parallel_for(0, all.size() * shape.heads, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin)
        attend(all[begin / shape.heads], seen[begin / shape.heads], begin % shape.heads);
    });
  };
#ifdef GAUGEKIT_X86
  if constexpr (std::is_same_v<S, BFloat16>)
    if (isa() >= Isa::bf16)
      return each([&](const Sequence& s, const Sight& sight, int64_t head) {
        attend_backward_pairs(f, s, sight, head);
      });
#endif
  each([&](const Sequence& s, const Sight& sight, int64_t head) { attend_backward(f, s, sight, head); });
}

// Adds the parts of the query heads that share a key head, in their order, and writes the sums.
template <class S>
void add_parts(const std::vector<const accumulator<S>*>& parts, int64_t step, S* to, int64_t to_step,
               int64_t rows, int64_t columns) {
  using A = accumulator<S>;
  std::vector<A> sum(columns);
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(sum.begin(), sum.end(), A(0));
    for (const A* part : parts)
      for (int64_t i = 0; i < columns; ++i) sum[i] += part[r * step + i];
    write_lines(Writing<S>{to + r * to_step, 0, sum.data(), columns, 1, columns, A(1)});
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor a, Tensor lse,
                                            std::vector<int64_t> rank, bool causal,
                                            std::optional<int64_t> window, Optional query_start,
                                            Optional key_lengths, Optional cu_seqlens, double scale) {
  const RaggedArguments arguments{q, k, v, rank, causal, window, query_start, key_lengths, cu_seqlens};
  const Ranks ranks = arguments.ranks();
  const Shape shape = arguments.shape(ranks);
  const std::vector<Sequence> all = arguments.sequences(shape);
  check_shape("grad", grad, {q.size(0), shape.heads, q.size(1), shape.width});
  check_shape("a", a, {q.size(0), shape.heads, q.size(1), shape.width});
  check_shape("lse", lse, {q.size(0), shape.heads, q.size(1)});
  check_dtype("grad", grad, v.scalar_type());
  check_dtype("a", a, v.scalar_type());
  check_dtype("lse", lse, accumulated(q));
  Tensor dq = torch::stable::new_empty(q, q.sizes()), dk = torch::stable::new_empty(k, k.sizes());
  Tensor dv = rows_like(v);
  torch::stable::zero_(dk);  // padding keys are not visited
  torch::stable::zero_(dv);
  if (dq.numel() == 0 || grad.numel() == 0) {
    torch::stable::zero_(dq);
    return {dq, dk, dv};
  }
  const Tensor q_ = with_contiguous_rows(q), k_ = with_contiguous_rows(k), v_ = with_contiguous_rows(v);
  const Tensor g = with_contiguous_rows(grad), a_ = with_contiguous_rows(a);
  const Tensor log = torch::stable::contiguous(lse);
  dispatch(q.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    using A = accumulator<S>;
    const auto run = [&](auto dk_rows, auto dv_rows) {
      using T = std::remove_reference_t<decltype(*dk_rows.data)>;
      backward_into(RaggedBackward<S, T>{shape, ranks, rows<const S>(g), one_head<const S>(q_),
                                         one_head<const S>(k_), rows<const S>(v_), rows<const S>(a_),
                                         static_cast<const A*>(log.const_data_ptr()), one_head<S>(dq),
                                         dk_rows, dv_rows, q.size(1), scale},
                    shape, all);
    };
    if (ranks.repeats == 1) return run(one_head<S>(dk), rows<S>(dv));
    const auto type = std::make_optional(accumulated(q));
    const Tensor dk_parts = torch::stable::new_empty(q, {q.size(0), k.size(1), q.size(2)}, type);
    const Tensor dv_parts =
        torch::stable::new_empty(q, {q.size(0), shape.heads, k.size(1), shape.width}, type);
    const Rows<A> dk_rows = one_head<A>(dk_parts), dv_rows = rows<A>(dv_parts);
    run(dk_rows, dv_rows);
    parallel_for(0, all.size() * shape.groups, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const Sequence& s = all[begin / shape.groups];
        const int64_t group = begin % shape.groups, first = group * ranks.repeats;
        std::vector<const A*> of_keys, of_values;
        for (int64_t head = first; head < first + ranks.repeats; ++head) {
          of_keys.push_back(dk_rows.at(s.batch, 0, s.first_key) + ranks.query_column(head));
          of_values.push_back(dv_rows.at(s.batch, head, s.first_key));
        }
        add_parts(of_keys, dk_rows.stride.row,
                  one_head<S>(dk).at(s.batch, 0, s.first_key) + ranks.before[group], dk.stride(1), s.keys,
                  rank[group]);
        add_parts(of_values, dv_rows.stride.row, rows<S>(dv).at(s.batch, group, s.first_key), dv.stride(2),
                  s.keys, shape.width);
      }
    });
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace gaugekit

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("ragged_attention", TORCH_BOX(&gaugekit::forward));
  m.impl("ragged_attention_backward", TORCH_BOX(&gaugekit::backward));
}
