// gaugekit::gauge_linear on the CPU: every head of a projection whose gauge is fixed, in one piece of work.
#include <atomic>

#include "common/linear.h"
#include "cpu/gauge_linear_inputs.h"
#include "cpu/gauge_linear_tile.h"

namespace gaugekit {
namespace {

using torch::stable::parallel_for;

constexpr int64_t MOST_ROWS = 384, LEAST_ROWS = 48;  // of a piece that a thread takes: x, F stay in its cache

struct Operands {
  const Tensor &x, &free, &rows;
  const Optional& bias;
  int64_t batch, inputs, heads, width;

  Operands(const Tensor& x, const Tensor& free, const Tensor& rows, const Optional& bias)
      : x(x), free(free), rows(rows), bias(bias) {
    STD_TORCH_CHECK(x.dim() >= 1 && free.dim() == 3 && rows.dim() == 2,
                    "x, free, rows: expected [..., D], [heads, D - width, width] and [heads, width]");
    inputs = x.size(x.dim() - 1), heads = rows.size(0), width = rows.size(1);
    check_shape("free", free, {heads, inputs - width, width});
    check_dtype("free", free, x.scalar_type());
    check_dtype("rows", rows, ScalarType::Int);
    if (bias) {
      check_shape("bias", *bias, {heads * width});
      check_dtype("bias", *bias, x.scalar_type());
    }
    batch = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) batch *= x.size(i);
  }
};

// Writes every head's columns to `out`, whose rows are `out_row` apart.
template <class S>
void heads_into(const Operands& f, void* out, int64_t out_row) {
  int64_t x_row = row_distance(f.x);
  const Tensor x = x_row < 0 ? torch::stable::contiguous(f.x) : f.x, free = dense(f.free);
  if (x_row < 0) x_row = f.inputs;
  const Optional bias = f.bias ? Optional(dense(*f.bias)) : std::nullopt;
  const Inputs inputs(f.rows, f.inputs);
  const int64_t depth = f.inputs - f.width, row_products = std::max<int64_t>(1, f.inputs * f.width);
  const int64_t work = f.batch * f.heads * row_products,
                wanted = std::max<int64_t>(1, work / THREAD_PRODUCTS);
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), wanted);
  // Four pieces a thread, so that the last of them keeps nobody waiting for long.
  const int64_t share = f.batch * f.heads / (4 * most) / GAUGE_ROWS * GAUGE_ROWS;
  const int64_t step = std::clamp(share, LEAST_ROWS, MOST_ROWS);
  // Of nearly as many rows each, and as many for every thread.
  int64_t blocks = (f.batch + step - 1) / step;
  while (blocks * f.heads % most && (blocks + 1) * LEAST_ROWS <= f.batch) ++blocks;
  const auto first_of = [&](int64_t block) {
    return block == blocks ? f.batch : f.batch * block / blocks / GAUGE_ROWS * GAUGE_ROWS;
  };
  const int64_t pieces = blocks * f.heads;
  const int64_t threads = std::min(pieces, most);
  const S* weights = static_cast<const S*>(free.const_data_ptr());
  std::atomic<int64_t> next{0};
  const auto turns = [&](int64_t, int64_t) {
    std::vector<accumulator<S>> wide(std::is_same_v<S, accumulator<S>> ? 0 : 8 * f.inputs);
    for (int64_t piece; (piece = next++) < pieces;) {
      const int64_t head = piece % f.heads, block = piece / f.heads, after = piece + threads;
      const GaugeHead<S> part{static_cast<const S*>(x.const_data_ptr()),
                              x_row,
                              f.inputs,
                              first_of(block),
                              first_of(block + 1),
                              weights + head * depth * f.width,
                              depth,
                              f.width,
                              inputs.others(head),
                              inputs.own(head),
                              bias ? static_cast<const S*>(bias->const_data_ptr()) + head * f.width : nullptr,
                              static_cast<S*>(out) + head * f.width,
                              out_row,
                              after < f.heads ? weights + after * depth * f.width : nullptr};
      gauge_head(part, wide.data());
    }
  };
  if (threads <= 1) return turns(0, 1);
  parallel_for(0, threads, 1, turns);
}

void heads_into(const Operands& f, void* out, int64_t out_row) {
  switch (f.x.scalar_type()) {
    case ScalarType::Float:
      return heads_into<float>(f, out, out_row);
    case ScalarType::Double:
      return heads_into<double>(f, out, out_row);
    case ScalarType::BFloat16:
      return heads_into<BFloat16>(f, out, out_row);
    case ScalarType::Half:
      return heads_into<Float16>(f, out, out_row);
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

Tensor gauge_linear(const Tensor& x, const Tensor& free, const Tensor& rows, const Optional& bias,
                    const Optional& weight, const Optional& weight_bias) {
  const Operands f(x, free, rows, bias);
  const int64_t before = weight ? weight->size(0) : 0, columns = before + f.heads * f.width;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(columns);
  Tensor out = torch::stable::new_empty(x, sizes);
  if (out.numel() == 0) return out;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  if (weight) {
    check_shape("weight", *weight, {before, f.inputs});
    check_dtype("weight", *weight, x.scalar_type());
    if (weight_bias) check_shape("weight_bias", *weight_bias, {before});
    const Tensor flat = torch::stable::reshape(x, {f.batch, f.inputs});
    if (before > 0)
      linear_into(matrix(to, x.scalar_type(), f.batch, before, columns), flat, *weight, weight_bias);
  }
  heads_into(f, to + before * x.element_size(), columns);
  return out;
}

}  // namespace
}  // namespace gaugekit

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("gauge_linear", TORCH_BOX(&gaugekit::gauge_linear));
  m.impl("gauge_linear_forward", TORCH_BOX(&gaugekit::gauge_linear));
}
