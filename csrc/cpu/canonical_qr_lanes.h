// Sums and products whose every rounding is fixed: the same bits at any width of the registers, any level of
// optimisation and any number of threads. Free of torch.
//
// Two rules make it so. A dot product has eight partial sums, by the index modulo 8, added up in one tree. In
// a matrix product each element is one chain of fused multiply-adds over ascending indices; registers hold
// several elements, never parts of one. fma, +, *, / and sqrt are exact to the last bit by IEEE 754, and
// nothing else is called.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace gaugekit::qr {

constexpr int kLanes = 8;

template <int W>
using Doubles = Vector<double, W>;

template <int W>
GAUGEKIT_INLINE Doubles<W> fma(Doubles<W> a, Doubles<W> b, Doubles<W> c) {
  Doubles<W> r{};
  for (int i = 0; i < W; ++i) r[i] = __builtin_fma(a[i], b[i], c[i]);
  return r;
}

// Less zero, which changes no bit: plus zero would be an addition.
template <int W>
GAUGEKIT_INLINE Doubles<W> all(double value) {
  return value - Doubles<W>{};
}

template <int W>
GAUGEKIT_INLINE Doubles<W> load(const double* from) {
  Doubles<W> r;
  std::memcpy(&r, from, sizeof(r));
  return r;
}

template <int W>
GAUGEKIT_INLINE void store(double* to, Doubles<W> value) {
  std::memcpy(to, &value, sizeof(value));
}

GAUGEKIT_INLINE double tree(const double (&lane)[kLanes]) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// Dot products of R rows, `stride` apart, with u.
template <int R, int W>
GAUGEKIT_INLINE void dots(const double* u, const double* rows, int64_t stride, int64_t n, double (&sums)[R]) {
  constexpr int parts = kLanes / W;
  Doubles<W> partial[R][parts] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes)
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < parts; ++p)
        partial[r][p] = fma<W>(load<W>(u + k + p * W), load<W>(rows + r * stride + k + p * W), partial[r][p]);
  for (int r = 0; r < R; ++r) {
    double lane[kLanes];
    for (int p = 0; p < parts; ++p) store<W>(lane + p * W, partial[r][p]);
    for (int64_t rest = k; rest < n; ++rest)
      lane[rest - k] = __builtin_fma(u[rest], rows[r * stride + rest], lane[rest - k]);
    sums[r] = tree(lane);
  }
}

// rows -= (tau · rows·u) uᵀ, of R rows.
template <int R, int W>
GAUGEKIT_INLINE void reflect(const double* u, double tau, double* rows, int64_t stride, int64_t n) {
  double sums[R];
  dots<R, W>(u, rows, stride, n, sums);
  for (int r = 0; r < R; ++r) sums[r] = -(tau * sums[r]);
  int64_t k = 0;
  for (; k + W <= n; k += W) {
    const Doubles<W> part = load<W>(u + k);
    for (int r = 0; r < R; ++r) {
      double* row = rows + r * stride + k;
      store<W>(row, fma<W>(all<W>(sums[r]), part, load<W>(row)));
    }
  }
  for (; k < n; ++k)
    for (int r = 0; r < R; ++r) rows[r * stride + k] = __builtin_fma(sums[r], u[k], rows[r * stride + k]);
}

template <int W>
GAUGEKIT_INLINE void reflect_rows(const double* u, double tau, double* rows, int64_t stride, int64_t n,
                                  int64_t count) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) reflect<4, W>(u, tau, rows + r * stride, stride, n);
  for (; r < count; ++r) reflect<1, W>(u, tau, rows + r * stride, stride, n);
}

// c[R][8] += a[R][n] · b[n][8], in chains over ascending n.
template <int R, int W>
GAUGEKIT_INLINE void tile(const double* a, int64_t a_stride, const double* b, double* c, int64_t c_stride,
                          int64_t n) {
  constexpr int parts = kLanes / W;
  Doubles<W> sums[R][parts];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < parts; ++p) sums[r][p] = load<W>(c + r * c_stride + p * W);
  for (int64_t k = 0; k < n; ++k) {
    Doubles<W> column[parts];
    for (int p = 0; p < parts; ++p) column[p] = load<W>(b + kLanes * k + p * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Doubles<W> factor = all<W>(a[r * a_stride + k]);
#pragma GCC unroll 16
      for (int p = 0; p < parts; ++p) sums[r][p] = fma<W>(factor, column[p], sums[r][p]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < parts; ++p) store<W>(c + r * c_stride + p * W, sums[r][p]);
}

// Rows of a tile, for as many registers as the instruction set has.
template <int W>
constexpr int kTileRows = W == 8   ? 12
                          : W == 4 ? 6
                                   : 2;

template <int W>
GAUGEKIT_INLINE void tiles(const double* a, int64_t a_stride, const double* b, double* c, int64_t c_stride,
                           int64_t n, int64_t rows) {
  constexpr int R = kTileRows<W>;
  int64_t r = 0;
  for (; r + R <= rows; r += R) tile<R, W>(a + r * a_stride, a_stride, b, c + r * c_stride, c_stride, n);
  for (; r < rows; ++r) tile<1, W>(a + r * a_stride, a_stride, b, c + r * c_stride, c_stride, n);
}

}  // namespace gaugekit::qr
