// gaugekit::shaped_combine, its in-place form and its backward on the CPU.

#include <tuple>

#include "cpu/shaped_combine_backward.h"
#include "cpu/shaped_combine_chunks.h"
#include "cpu/shaped_combine_forward.h"
#include "cpu/shaped_combine_tensors.h"

namespace gaugekit {
namespace {

using torch::stable::parallel_for;

// Rows of a task are worth a thread from this many elements on.
constexpr int64_t GRAIN = 1 << 15;

template <class A>
std::vector<A> gain(const char* name, const Optional& given, int64_t heads, A absent, bool& has) {
  has = given.has_value();
  if (!has) return std::vector<A>(heads, absent);
  check_shape(name, *given, {heads});
  const Tensor x = torch::stable::contiguous(*given);
  std::vector<A> values(heads);
  for (int64_t h = 0; h < heads; ++h) {
    switch (x.scalar_type()) {
      case ScalarType::Float:
        values[h] = static_cast<A>(x.const_data_ptr<float>()[h]);
        break;
      case ScalarType::Double:
        values[h] = static_cast<A>(x.const_data_ptr<double>()[h]);
        break;
      case ScalarType::BFloat16:
        values[h] = load<1>(static_cast<const BFloat16*>(x.const_data_ptr()) + h, 1)[0];
        break;
      case ScalarType::Half:
        values[h] = load<1>(static_cast<const Float16*>(x.const_data_ptr()) + h, 1)[0];
        break;
      default:
        STD_TORCH_CHECK(false, name, ": expected a floating dtype");
    }
  }
  return values;
}

void write_gain(const Tensor& to, const std::vector<double>& values) {
  for (int64_t h = 0; h < to.size(0); ++h) {
    switch (to.scalar_type()) {
      case ScalarType::Float:
        to.mutable_data_ptr<float>()[h] = static_cast<float>(values[h]);
        break;
      case ScalarType::Double:
        to.mutable_data_ptr<double>()[h] = values[h];
        break;
      case ScalarType::BFloat16:
        store<1>(static_cast<BFloat16*>(to.mutable_data_ptr()) + h,
                 Vector<float, 1>{static_cast<float>(values[h])}, 1);
        break;
      default:
        store<1>(static_cast<Float16*>(to.mutable_data_ptr()) + h,
                 Vector<float, 1>{static_cast<float>(values[h])}, 1);
    }
  }
}

struct Arguments {
  const Tensor &a, &v;
  const Optional &alpha, &beta, &gamma, &v0, &lam;
  bool causal;
  const std::optional<int64_t>& window;
  const Optional &query_start, &key_lengths, &cu_seqlens;

  Shape shape() const {
    STD_TORCH_CHECK(a.dim() == 4 && v.dim() == 4, "a, v: expected [B, H, T, V] and [B, G, S, V]");
    STD_TORCH_CHECK(
        v.size(0) == a.size(0) && v.size(3) == a.size(3) && v.size(1) > 0 && a.size(1) % v.size(1) == 0,
        "v: expected [B, G, S, V] with a's B and V and G dividing H");
    STD_TORCH_CHECK(v.scalar_type() == a.scalar_type(), "v: expected the dtype of a");
    STD_TORCH_CHECK(v0.has_value() == lam.has_value(), "v0, lam: expected both or neither");
    if (v0) {
      check_dtype("v0", *v0, a.scalar_type());
      check_shape("v0", *v0, {a.size(0), v.size(1), a.size(2), a.size(3)});
    }
    STD_TORCH_CHECK(!window || *window > 0, "window: expected a positive number");
    STD_TORCH_CHECK(causal || (!alpha && !lam) || a.size(2) == v.size(2),
                    "alpha, lam: without causal they need T = S");
    return {a.size(1), v.size(1), a.size(3), causal, window ? std::min(*window, FAR) : 0};
  }
  std::vector<Sequence> sequences() const {
    return gaugekit::sequences(shape(), a.size(0), a.size(2), v.size(2), query_start, key_lengths,
                               cu_seqlens);
  }
  template <class A>
  Gains<A> gains() const {
    const int64_t heads = a.size(1);
    Gains<A> g;
    g.alpha = gain<A>("alpha", alpha, heads, 0, g.has_alpha);
    g.beta = gain<A>("beta", beta, heads, 1, g.has_beta);
    g.gamma = gain<A>("gamma", gamma, heads, 0, g.has_gamma);
    g.lambda = gain<A>("lam", lam, heads, 0, g.has_lambda);
    return g;
  }
};

// One chunk of a sequence, or all of them.
struct Item {
  const Sequence* sequence;
  Span chunks;
};

std::vector<Item> items(const Shape& shape, const std::vector<Sequence>& all, bool split) {
  std::vector<Item> found;
  for (const Sequence& s : all) {
    const int64_t chunks = shape.chunks(s);
    for (int64_t c = 0; split && c < chunks; ++c) found.push_back({&s, {c, c + 1}});
    if (!split) found.push_back({&s, {0, chunks}});
  }
  return found;
}

int64_t count_chunks(const Shape& shape, const std::vector<Sequence>& all) {
  return all.empty() ? 0 : all.back().chunks_before + shape.chunks(all.back());
}

// Runs task(sequence, chunks, units) over every item and `units` heads or groups of it, side by side where
// they are neighbours in memory: rows of several heads are then read as one stream.
template <class Task>
void over_items(const std::vector<Item>& items, int64_t units, int64_t elements, const Task& task) {
  const int64_t count = static_cast<int64_t>(items.size()) * units;
  const int64_t grain = std::max<int64_t>(1, GRAIN * count / std::max<int64_t>(1, elements));
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const Item& item = items[begin / units];
      const int64_t first = begin % units, last = std::min(units, first + end - begin);
      task(*item.sequence, item.chunks, Span{first, last});
      begin += last - first;
    }
  });
}

// Whether chunks of one sequence are worked on side by side: where a mean is carried from chunk to chunk that
// costs one more reading, so it is done where sequences and heads are too few for the threads.
bool split_sequences(const Shape& shape, bool mean, int64_t sequences, int64_t units, int64_t elements) {
  const int64_t threads = torch::stable::get_num_threads();
  if (!mean || !shape.causal || shape.window) return true;
  return threads > 1 && elements > GRAIN && sequences * units < 4 * threads;
}

// What the sweeps need to know of other chunks; empty where they carry it along.
template <class S>
std::vector<double> sums_of_chunks(ChunkSums<S> f, const std::vector<Sequence>& all, bool split,
                                   int64_t elements) {
  if (f.shape.window || !(split || f.shape.open())) return {};
  std::vector<double> sums(count_chunks(f.shape, all) * f.units * f.shape.width);
  f.sums = sums.data();
  over_items(items(f.shape, all, true), f.units, elements,
             [&](const Sequence& s, Span chunks, Span units) { chunk_sums(f, s, chunks, units); });
  for (const Sequence& s : all) chunk_bases(f, s);
  return sums;
}

void combine_into(const Tensor& out, const Arguments& arguments) {
  const Shape shape = arguments.shape();
  const Tensor a = with_contiguous_rows(arguments.a), v = with_contiguous_rows(arguments.v);
  const Optional v0 = arguments.v0 ? Optional(with_contiguous_rows(*arguments.v0)) : std::nullopt;
  const std::vector<Sequence> all = arguments.sequences();
  if (out.numel() == 0) return;
  dispatch(a.scalar_type(), [&](auto tag) {
    using S = decltype(tag);
    Forward<S> f{shape,       arguments.gains<accumulator<S>>(), rows<const S>(a), rows<const S>(v), {},
                 rows<S>(out)};
    if (v0) f.v0 = rows<const S>(*v0);
    const bool split = split_sequences(shape, f.gains.has_gamma, all.size(), shape.heads, out.numel());
    std::vector<double> sums;
    if (f.gains.has_gamma)
      sums = sums_of_chunks(ChunkSums<S>{shape, f.v, false, shape.groups, nullptr}, all, split, v.numel());
    f.sums = sums.empty() ? nullptr : sums.data();
    over_items(items(shape, all, split), shape.heads, out.numel(),
               [&](const Sequence& s, Span chunks, Span heads) { shaped_combine(f, s, chunks, heads); });
  });
}

Tensor combine(Tensor a, Tensor v, Optional alpha, Optional beta, Optional gamma, Optional v0, Optional lam,
               bool causal, std::optional<int64_t> window, Optional query_start, Optional key_lengths,
               Optional cu_seqlens) {
  const Tensor out = rows_like(a);
  combine_into(out,
               {a, v, alpha, beta, gamma, v0, lam, causal, window, query_start, key_lengths, cu_seqlens});
  return out;
}

void combine_in_place(Tensor a, Tensor v, Optional alpha, Optional beta, Optional gamma, Optional v0,
                      Optional lam, bool causal, std::optional<int64_t> window, Optional query_start,
                      Optional key_lengths, Optional cu_seqlens) {
  const Arguments arguments{a,   v,      alpha,  beta,        gamma,       v0,
                            lam, causal, window, query_start, key_lengths, cu_seqlens};
  if (a.size(3) > 1 && a.stride(3) != 1) {
    Tensor dense = torch::stable::new_empty(a, a.sizes());
    combine_into(dense, arguments);
    torch::stable::copy_(a, dense);
  } else {
    combine_into(a, arguments);
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients combine_backward(Tensor grad, Tensor a, Tensor v, Optional alpha, Optional beta, Optional gamma,
                           Optional v0, Optional lam, bool causal, std::optional<int64_t> window,
                           Optional query_start, Optional key_lengths, Optional cu_seqlens) {
  const Arguments arguments{a,   v,      alpha,  beta,        gamma,       v0,
                            lam, causal, window, query_start, key_lengths, cu_seqlens};
  const Shape shape = arguments.shape();
  check_shape("grad", grad, {a.size(0), a.size(1), a.size(2), a.size(3)});
  check_dtype("grad", grad, a.scalar_type());
  const std::vector<Sequence> all = arguments.sequences();
  const Tensor g = with_contiguous_rows(grad), a_ = with_contiguous_rows(a), v_ = with_contiguous_rows(v);
  const Optional v0_ = v0 ? Optional(with_contiguous_rows(*v0)) : std::nullopt;
  const auto like = [&](const Optional& x) {
    return x ? torch::stable::new_empty(*x, x->sizes()) : torch::stable::new_empty(a, {0});
  };
  Tensor da = rows_like(a), dv = rows_like(v), dv0 = v0 ? rows_like(*v0) : like(v0);
  if (key_lengths) torch::stable::zero_(dv);  // padding keys are not visited
  const int64_t chunks = count_chunks(shape, all);
  std::vector<double> partial(chunks * shape.heads * GAIN_COUNT, 0.0);
  if (a.numel() == 0) {
    torch::stable::zero_(dv);
    torch::stable::zero_(dv0);
  } else {
    dispatch(a.scalar_type(), [&](auto tag) {
      using S = decltype(tag);
      Backward<S> f{shape,
                    arguments.gains<accumulator<S>>(),
                    rows<const S>(g),
                    rows<const S>(a_),
                    rows<const S>(v_),
                    {},
                    rows<S>(da),
                    rows<S>(dv),
                    {},
                    partial.data()};
      if (v0) f.v0 = rows<const S>(*v0_), f.dv0 = rows<S>(dv0);
      const int64_t work = a.numel() + v.numel() * shape.heads_of_group();
      const bool split = split_sequences(shape, f.gains.has_gamma, all.size(), shape.groups, work);
      std::vector<double> sums;
      if (f.gains.has_gamma)
        sums = sums_of_chunks(ChunkSums<S>{shape, f.grad, true, shape.heads, nullptr}, all, split, a.numel());
      f.sums = sums.empty() ? nullptr : sums.data();
      over_items(items(shape, all, split), shape.groups, work,
                 [&](const Sequence& s, Span c, Span groups) { shaped_combine_backward(f, s, c, groups); });
    });
  }
  const auto total = [&](const Optional& x, Gain gain, double sign) {
    Tensor result = like(x);
    if (!x) return result;
    std::vector<double> sums(shape.heads, 0.0);
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t h = 0; h < shape.heads; ++h)
        sums[h] += sign * partial[(i * shape.heads + h) * GAIN_COUNT + gain];
    write_gain(result, sums);
    return result;
  };
  return {da,
          dv,
          total(alpha, ALPHA, 1),
          total(beta, BETA, 1),
          total(gamma, GAMMA, 1),
          dv0,
          total(lam, LAMBDA, 1)};
}

}  // namespace
}  // namespace gaugekit

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("shaped_combine", TORCH_BOX(&gaugekit::combine));
  m.impl("shaped_combine_", TORCH_BOX(&gaugekit::combine_in_place));
  m.impl("shaped_combine_backward", TORCH_BOX(&gaugekit::combine_backward));
}
