// gaugekit::single_cache_attention on the CPU: one pass over the cache serves all heads.
//
// A sequence's rows are cut into splits of fixed length, which threads take in turns; each leaves its sums,
// and those of a query are added up in their order.

#include <atomic>
#include <vector>

#include "common/single_cache_arguments.h"
#include "cpu/shaped_combine_tensors.h"
#include "cpu/single_cache_attention_pairs.h"

namespace gaugekit {
namespace {

using torch::stable::parallel_for;

struct Given : CacheArguments {
  void check() const {
    STD_TORCH_CHECK(q.dim() == 4 && cache.dim() == 4, "q, cache: expected [B, H, T, C] and [B, G, S, C]");
    STD_TORCH_CHECK(cache.size(3) == q.size(3) && q.size(3) > 0 && cache.size(1) > 0 && q.size(1) > 0 &&
                        q.size(1) % cache.size(1) == 0,
                    "cache: expected q's channels, and groups that divide its heads");
    STD_TORCH_CHECK(!slices || q.size(3) % repeats() == 0, "slices: expected C divisible by H / G");
    STD_TORCH_CHECK(!window || *window > 0, "window: expected a positive number");
    check_dtype("cache", cache, q.scalar_type());
    if (block_table) {
      check_dtype("block_table", *block_table, ScalarType::Int);
      STD_TORCH_CHECK(block_table->dim() == 2 && block_table->size(0) == q.size(0) && cache.size(2) > 0,
                      "block_table: expected [B, P], and pages of at least one row");
    } else {
      STD_TORCH_CHECK(cache.size(0) == q.size(0), "cache: expected as many sequences as q");
    }
    STD_TORCH_CHECK(bool(cos) == bool(sin) && (cos || !key_gain), "cos, sin: expected together");
    for (const Optional* table : {&cos, &sin}) {
      if (!*table) continue;
      check_dtype("cos, sin", **table, accumulated());
      STD_TORCH_CHECK((*table)->dim() == 2 && (*table)->size(0) >= keys() && q.size(3) % 2 == 0 &&
                          (*table)->size(1) == cos->size(1) && 2 * cos->size(1) <= q.size(3),
                      "cos, sin: expected [at least S, at most C / 2]");
    }
  }
  ScalarType accumulated() const {
    return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
  Shape shape() const {
    return {q.size(1), cache.size(1), q.size(3), causal, window ? std::min(*window, FAR) : 0};
  }
};

// A gain of each head (of each channel) as accumulators, empty where it is absent.
template <class A>
std::vector<A> numbers(const char* name, const Optional& given, int64_t count, ScalarType dtype) {
  if (!given) return {};
  check_shape(name, *given, {count});
  const Tensor held = torch::stable::contiguous(*given);
  std::vector<A> values(count);
  const auto read = [&](const auto* from) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<A>(load<1>(from + i, 1)[0]);
  };
  if (held.scalar_type() == ScalarType::Float) {
    read(held.const_data_ptr<float>());
  } else {
    check_dtype(name, held, dtype);
    dispatch(dtype, [&](auto tag) { read(static_cast<const decltype(tag)*>(held.const_data_ptr())); });
  }
  return values;
}

// The pages of a sequence that its queries see must be there: what nobody sees is not looked at.
void check_pages(const SplitOperands& f, const Queries& queries, int64_t pages) {
  if (!f.table || !queries.seen.count()) return;
  const int32_t* table = f.table + queries.batch * f.table_row;
  for (int64_t p = queries.seen.first / f.page; p <= (queries.seen.last - 1) / f.page; ++p)
    STD_TORCH_CHECK(0 <= table[p] && table[p] < pages, "block_table: expected pages of the cache");
}

// Every split of every item, then the sums of each item's. Blocks: how they are multiplied.
template <class Blocks, class S>
void attend_items(const CacheSplit<S>& f, const std::vector<Queries>& items) {
  std::vector<std::pair<int64_t, int64_t>> turns;  // an item and one of its splits
  for (size_t item = 0; item < items.size(); ++item)
    for (int64_t i = 0; i < items[item].splits(); ++i) turns.push_back({item, i});
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), turns.size());
  const auto take = [&](int64_t, int64_t) {
    typename Blocks::Scratch scratch(f.scratch());
    for (size_t i; (i = next++) < turns.size();)
      attend_split<Blocks>(f, items[turns[i].first], turns[i].second, scratch);
  };
  if (threads > 1) parallel_for(0, threads, 1, take);
  if (threads == 1) take(0, 1);
  parallel_for(0, items.size(), 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) combine_splits(f, items[begin]);
  });
}

template <class S>
void attend_into(const Given& given, double scale, const Tensor& out) {
  using A = accumulator<S>;
  const Tensor q = with_contiguous_rows(given.q), cache = with_contiguous_rows(given.cache);
  const Shape shape = given.shape();
  const ScalarType dtype = given.q.scalar_type();
  const std::vector<Sequence> all = sequences(shape, q.size(0), q.size(2), given.keys(), given.query_start,
                                              given.key_lengths, std::nullopt);
  const auto contiguous = [](const Optional& x) {
    return x ? Optional(torch::stable::contiguous(*x)) : std::nullopt;
  };
  const Optional table = contiguous(given.block_table), cos = contiguous(given.cos),
                 sin = contiguous(given.sin);
  CacheSplit<S> f{};
  f.shape = shape, f.width = given.width(), f.queries = q.size(2), f.scale = scale;
  f.q = rows<const S>(q), f.cache = rows<const S>(cache), f.out = rows<S>(out);
  f.page = cache.size(2);
  if (table) f.table = table->const_data_ptr<int32_t>(), f.table_row = table->size(1);
  f.alpha = numbers<A>("alpha", given.alpha, shape.heads, dtype);
  f.beta = numbers<A>("beta", given.beta, shape.heads, dtype);
  f.gamma = numbers<A>("gamma", given.gamma, shape.heads, dtype);
  f.key_gain = numbers<A>("key_gain", given.key_gain, shape.width, dtype);
  if (cos) f.cos = static_cast<const A*>(cos->const_data_ptr()), f.pairs = cos->size(1);
  if (cos) f.sin = static_cast<const A*>(sin->const_data_ptr());
  std::vector<Queries> items;
  int64_t size = 0;
  for (const Sequence& s : all)
    for (int64_t group = 0; group < shape.groups; ++group)
      for (int64_t t = 0; t < s.queries; t += f.queries_of_item()) {
        items.push_back(f.item(s, group, t, size));
        check_pages(f, items.back(), cache.size(0));
        size += items.back().splits() * f.part(items.back()).size;
      }
  const Tensor held = torch::stable::new_empty(q, {size + 1}, std::make_optional(given.accumulated()));
  f.parts = static_cast<A*>(held.mutable_data_ptr());
#ifdef GAUGEKIT_X86
  if constexpr (std::is_same_v<S, BFloat16>)
    if (isa() >= Isa::bf16) return attend_items<PairBlocks>(f, items);
#endif
  attend_items<PlainBlocks<S>>(f, items);
}

Tensor single_cache_attention(Tensor q, Tensor cache, bool slices, Optional alpha, Optional beta,
                              Optional gamma, Optional key_gain, Optional cos, Optional sin, bool causal,
                              std::optional<int64_t> window, Optional query_start, Optional key_lengths,
                              Optional block_table, double scale) {
  const Given given{{q, cache, slices, alpha, beta, gamma, key_gain, cos, sin, causal, window, query_start,
                     key_lengths, block_table}};
  given.check();
  // O lies as [B, T, H, V], so that joining the heads copies nothing.
  const Tensor out = torch::stable::transpose(
      torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), given.width()}), 1, 2);
  if (out.numel() > 0)
    dispatch(q.scalar_type(), [&](auto tag) { attend_into<decltype(tag)>(given, scale, out); });
  return out;
}

}  // namespace
}  // namespace gaugekit

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("single_cache_attention", TORCH_BOX(&gaugekit::single_cache_attention));
}
