// gaugekit::gauge_linear_backward on the CPU: the gradients of x and F of all heads. That of x is torch's
// product with the dense weight, made in memory of its own; that of F is summed where it belongs.
#include <atomic>
#include <tuple>

#include "common/linear.h"
#include "cpu/gauge_linear_gradient.h"
#include "cpu/gauge_linear_inputs.h"

namespace gaugekit {
namespace {

using torch::stable::parallel_for;

constexpr int64_t THREAD_NUMBERS = 1 << 16;  // copied, that are worth a thread
constexpr int64_t PIECE_INPUTS = 24;         // a multiple of every tile's

template <class S>
S one() {
  if constexpr (std::is_same_v<S, BFloat16>)
    return {0x3f80};
  else if constexpr (std::is_same_v<S, Float16>)
    return {0x3c00};
  else
    return S(1);
}

// A tensor [..., columns] as one matrix, in its own memory where that is possible.
struct Flat {
  Tensor held;
  int64_t rows, columns, distance;

  explicit Flat(const Tensor& x)
      : held(row_distance(x) < 0 ? torch::stable::contiguous(x) : x), columns(x.size(x.dim() - 1)) {
    rows = x.numel() / columns;
    distance = row_distance(held);
  }
  template <class S>
  const S* data() const {
    return static_cast<const S*>(held.const_data_ptr());
  }
  Tensor matrix() const { return over({rows, columns}, {distance, 1}); }
  Tensor transposed() const { return over({columns, rows}, {1, distance}); }

 private:
  Tensor over(std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) const {
    return torch::stable::from_blob(const_cast<void*>(held.const_data_ptr()), sizes, strides,
                                    torch::headeronly::DeviceType::CPU, held.scalar_type());
  }
};

struct Sizes {
  int64_t inputs, heads, width, depth;
};

// The weight [inputs, heads · width] that x goes through.
template <class S>
Tensor weight_of(const Tensor& free, const Inputs& inputs, const Sizes& f) {
  const int64_t columns = f.heads * f.width;
  Tensor weight = torch::stable::new_empty(free, {f.inputs, columns});
  S* to = static_cast<S*>(weight.mutable_data_ptr());
  const S* from = static_cast<const S*>(free.const_data_ptr());
  const auto fill = [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      for (int64_t i = 0; i < f.width; ++i) {
        S* row = to + inputs.own(h)[i] * columns + h * f.width;
        std::memset(row, 0, f.width * sizeof(S));
        row[i] = one<S>();
      }
      for (int64_t p = 0; p < f.depth; ++p)
        std::memcpy(to + inputs.others(h)[p] * columns + h * f.width, from + (h * f.depth + p) * f.width,
                    f.width * sizeof(S));
    }
  };
  parallel_for(0, f.heads, std::max<int64_t>(1, THREAD_NUMBERS / (f.inputs * f.width)), fill);
  return weight;
}

// dF by our own sums.
template <class S>
void gradient_of_free(const Flat& grad, const Flat& x, const Inputs& inputs, const Sizes& f, S* out) {
  const int64_t work = grad.rows * f.heads * f.depth * f.width;
  const int64_t most =
      std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, work / THREAD_PRODUCTS));
  const int64_t share = f.heads * f.depth / (4 * most) / PIECE_INPUTS * PIECE_INPUTS;
  const int64_t step = most == 1 ? f.depth : std::clamp(share, PIECE_INPUTS, std::max(PIECE_INPUTS, f.depth));
  const int64_t blocks = (f.depth + step - 1) / step, pieces = blocks * f.heads;
  std::atomic<int64_t> next{0};
  const auto turns = [&](int64_t, int64_t) {
    for (int64_t piece; (piece = next++) < pieces;) {
      const int64_t head = piece / blocks, first = piece % blocks * step;
      gauge_gradient(GaugeGradient<S>{x.data<S>(), x.distance, grad.data<S>() + head * f.width, grad.distance,
                                      grad.rows, f.width, inputs.others(head), first,
                                      std::min(first + step, f.depth), out + head * f.depth * f.width});
    }
  };
  if (most <= 1) return turns(0, 1);
  parallel_for(0, std::min(pieces, most), 1, turns);
}

// dF in 16 bits: torch's product, of which the rows of the identity are left out.
template <class S>
void gradient_by_torch(const Flat& grad, const Flat& x, const Inputs& inputs, const Sizes& f, S* out) {
  const int64_t columns = f.heads * f.width;
  const Tensor whole = torch::stable::new_empty(grad.held, {f.inputs, columns});
  linear_into(whole, x.transposed(), grad.transposed(), std::nullopt);
  const S* from = static_cast<const S*>(whole.const_data_ptr());
  for (int64_t h = 0; h < f.heads; ++h)
    for (int64_t p = 0; p < f.depth; ++p, out += f.width)
      std::memcpy(out, from + inputs.others(h)[p] * columns + h * f.width, f.width * sizeof(S));
}

template <class S>
void gradients(const Tensor& grad_given, const Tensor& x_given, const Tensor& free, const Tensor& rows,
               const Sizes& f, Tensor* dx, Tensor* dfree) {
  const Inputs inputs(rows, f.inputs);
  const Flat grad(grad_given);
  if (dx) {
    const Tensor weight = weight_of<S>(dense(free), inputs, f);
    linear_into(matrix(dx->mutable_data_ptr(), dx->scalar_type(), grad.rows, f.inputs, f.inputs),
                grad.matrix(), weight, std::nullopt);
  }
  if (dfree) {
    S* out = static_cast<S*>(dfree->mutable_data_ptr());
    if (f.depth == 0) return;  // heads as wide as x: nothing learns
    if constexpr (std::is_same_v<S, accumulator<S>>)
      gradient_of_free<S>(grad, Flat(x_given), inputs, f, out);
    else
      gradient_by_torch<S>(grad, Flat(x_given), inputs, f, out);
  }
}

std::tuple<Tensor, Tensor> gauge_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& free,
                                                 const Tensor& rows, bool of_x, bool of_free) {
  STD_TORCH_CHECK(
      x.dim() >= 1 && free.dim() == 3 && rows.dim() == 2 && grad.dim() == x.dim(),
      "grad, x, free, rows: expected [..., heads · width], [..., D], [heads, D - width, width] and "
      "[heads, width]");
  const Sizes f{x.size(x.dim() - 1), rows.size(0), rows.size(1), free.size(1)};
  check_shape("free", free, {f.heads, f.inputs - f.width, f.width});
  check_dtype("rows", rows, ScalarType::Int);
  check_dtype("grad", grad, x.scalar_type());
  check_dtype("free", free, x.scalar_type());
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    STD_TORCH_CHECK(grad.size(i) == x.size(i), "grad: expected as many rows as x");
  STD_TORCH_CHECK(grad.size(x.dim() - 1) == f.heads * f.width, "grad: expected heads · width columns");
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  const std::vector<int64_t> none{0}, whole{f.heads, f.depth, f.width};
  Tensor dx = torch::stable::new_empty(grad, of_x ? sizes : none);
  Tensor dfree = torch::stable::new_empty(grad, of_free ? whole : none);
  if (x.numel() == 0 || grad.numel() == 0) {
    if (of_free) dfree = torch::stable::fill_(dfree, 0);
    return {dx, dfree};
  }
  Tensor *to_x = of_x ? &dx : nullptr, *to_free = of_free ? &dfree : nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      gradients<float>(grad, x, free, rows, f, to_x, to_free);
      break;
    case ScalarType::Double:
      gradients<double>(grad, x, free, rows, f, to_x, to_free);
      break;
    case ScalarType::BFloat16:
      gradients<BFloat16>(grad, x, free, rows, f, to_x, to_free);
      break;
    case ScalarType::Half:
      gradients<Float16>(grad, x, free, rows, f, to_x, to_free);
      break;
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
  return {dx, dfree};
}

}  // namespace
}  // namespace gaugekit

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("gauge_linear_backward", TORCH_BOX(&gaugekit::gauge_linear_backward));
}
