// The gradient of one head of a projection whose gauge is fixed: dF = x[·, others]ᵀ g, by tiles of inputs and
// columns that stay in registers. x is read through the list of inputs, where it lies. Free of torch.
#pragma once

#include "cpu/gauge_linear_tile.h"

#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

namespace gaugekit {

template <class S>
struct GaugeGradient {
  const S* x;  // [rows, inputs], rows x_row apart
  int64_t x_row;
  const S* grad;  // the head's columns [rows, width], rows grad_row apart
  int64_t grad_row, rows, width;
  const int32_t* others;  // places among the inputs
  int64_t first, last;    // of them, those of this piece
  S* out;                 // dF [depth, width], dense
};

// The sums over rows [begin, end) for MR inputs by NV registers of columns, added to what stands in `out` but
// for the first rows.
template <int W, int MR, int NV, class S>
GAUGEKIT_INLINE void gradient_tile(const GaugeGradient<S>& f, int64_t input, int64_t column, int64_t begin,
                                   int64_t end) {
  const S* line[MR];
  for (int m = 0; m < MR; ++m) line[m] = f.x + f.others[input + m];
  Vector<S, W> sum[MR][NV] = {};
  const S* b = f.grad + begin * f.grad_row + column;
  for (int64_t t = begin; t < end; ++t, b += f.grad_row) {
    const int64_t at = t * f.x_row;
    Vector<S, W> right[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) right[n] = load<W>(b + n * W, W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) sum[m][n] += line[m][at] * right[n];
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      S* to = f.out + (input + m) * f.width + column + n * W;
      store<W>(to, begin ? load<W>(to, W) + sum[m][n] : sum[m][n], W);
    }
}

// Every column from `column` on, in tiles of at most MOST registers' width; what is left singly.
template <int W, int MR, int MOST, class S>
GAUGEKIT_INLINE void gradient_columns(const GaugeGradient<S>& f, int64_t input, int64_t column, int64_t begin,
                                      int64_t end) {
  for (; column + MOST * W <= f.width; column += MOST * W)
    gradient_tile<W, MR, MOST>(f, input, column, begin, end);
  if constexpr (MOST > 1) {
    gradient_columns<W, MR, MOST / 2>(f, input, column, begin, end);
  } else if constexpr (W > 1) {
    gradient_columns<1, MR, 1>(f, input, column, begin, end);
  }
}

template <class S, int W>
GAUGEKIT_INLINE void gauge_gradient_body(const GaugeGradient<S>& given) {
  const GaugeGradient<S> f = given;
  constexpr int BYTES = W * sizeof(S), MR = BYTES == 64 ? 8 : BYTES == 32 ? 6 : 4;
  for (int64_t begin = 0; begin < f.rows; begin += SPAN) {
    const int64_t end = std::min(begin + SPAN, f.rows);
    int64_t input = f.first;
    for (; input + MR <= f.last; input += MR) gradient_columns<W, MR, 2>(f, input, 0, begin, end);
    for (; input + 2 <= f.last; input += 2) gradient_columns<W, 2, 4>(f, input, 0, begin, end);
    if (input < f.last) gradient_columns<W, 1, 8>(f, input, 0, begin, end);
  }
}

GAUGEKIT_KERNEL(gauge_gradient, gauge_gradient_body, (const GaugeGradient<S>& f), (f))

}  // namespace gaugekit

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
