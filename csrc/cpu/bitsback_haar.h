// From integers to a unit vector of uniform direction, and from a vector near it back to nearly the same
// integers. Free of torch; nothing but +, *, /, sqrt and fma, so the same bits on every machine.
//
// v of n dimensions by stick-breaking: v_k is t_k of what is left, ‖v_{k:}‖. For n dimensions left, and nu
// = n − 1, a normal z gives t² = 1 − exp(−z² s_n) with s_n = (8 nu + 3)² / ((8 nu + 1)² nu): Wallace's
// approximation of Student's t (Biometrika 1959), solved for t. z is the normal quantile of the integer c's
// bin, (c + 1/2) / 2^bits. The last component's sign is an integer of one bit. What is approximated (the
// quantile, exp, Wallace) shifts probabilities by parts in a thousand, and costs nothing else: both sides
// compute the same v.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "common/isa.h"
#include "common/simd.h"

namespace gaugekit::bitsback {

constexpr int kMaxBits = 16;
constexpr int kGrid = 1024, kCells = 4608;  // of the normal distribution function: to z = 4.5

// exp(−y), y from 0 to 700: 2^k times a Taylor polynomial.
GAUGEKIT_INLINE double exp_minus(double y) {
  constexpr double round = 0x1.8p52, log2e = 0x1.71547652b82fep0;
  constexpr double ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
  const double shifted = __builtin_fma(-y, log2e, round), k = shifted - round;
  const double r = __builtin_fma(-k, ln2_low, __builtin_fma(-k, ln2_high, -y));
  double p = 1.0 / 479001600;
  p = __builtin_fma(p, r, 1.0 / 39916800);
  p = __builtin_fma(p, r, 1.0 / 3628800);
  p = __builtin_fma(p, r, 1.0 / 362880);
  p = __builtin_fma(p, r, 1.0 / 40320);
  p = __builtin_fma(p, r, 1.0 / 5040);
  p = __builtin_fma(p, r, 1.0 / 720);
  p = __builtin_fma(p, r, 1.0 / 120);
  p = __builtin_fma(p, r, 1.0 / 24);
  p = __builtin_fma(p, r, 1.0 / 6);
  p = __builtin_fma(p, r, 0.5);
  p = __builtin_fma(p, r, 1.0);
  p = __builtin_fma(p, r, 1.0);
  const uint64_t exponent = (bits_as<uint64_t>(shifted) - bits_as<uint64_t>(round) + 1023) << 52;
  return p * bits_as<double>(exponent);
}

// log(1 + w), w from 0 to 1e300.
GAUGEKIT_INLINE double log_one_plus(double w) {
  constexpr uint64_t half_root = 0x3fe6a09e00000000, fraction = 0x000fffffffffffff;
  const uint64_t shifted = bits_as<uint64_t>(1.0 + w) - half_root, k = shifted >> 52;
  const double f = bits_as<double>((shifted & fraction) + half_root);
  const double exponent = bits_as<double>(k | 0x4330000000000000) - 0x1p52;
  const double r = k == 0 ? w : f - 1.0;
  const double s = r / (2.0 + r), t = s * s;
  double p = 2.0 / 17;
  p = __builtin_fma(p, t, 2.0 / 15);
  p = __builtin_fma(p, t, 2.0 / 13);
  p = __builtin_fma(p, t, 2.0 / 11);
  p = __builtin_fma(p, t, 2.0 / 9);
  p = __builtin_fma(p, t, 2.0 / 7);
  p = __builtin_fma(p, t, 2.0 / 5);
  p = __builtin_fma(p, t, 2.0 / 3);
  p = __builtin_fma(p, t, 2.0);
  return __builtin_fma(exponent, 0x1.62e42fefa39efp-1, s * p);
}

// The normal distribution function less 1/2 at z = i / kGrid, by Simpson's rule from 0.
inline const std::array<double, kCells + 2>& normal_grid() {
  static const std::array<double, kCells + 2> grid = [] {
    std::array<double, kCells + 2> sums{};
    constexpr double peak = 0.3989422804014327;
    const auto shape = [](double z) { return exp_minus(z * z * 0.5); };
    for (int i = 0; i <= kCells; ++i) {
      const double a = double(i) / kGrid, middle = (i + 0.5) / kGrid, b = double(i + 1) / kGrid;
      const double ends = __builtin_fma(peak, shape(a), peak * shape(b));
      const double simpson = __builtin_fma(4.0 * peak, shape(middle), ends);
      sums[i + 1] = __builtin_fma(simpson, 1.0 / (6 * kGrid), sums[i]);
    }
    return sums;
  }();
  return grid;
}

// z² of the 2^(bits − 1) quantiles above the median; the others are their mirror images.
inline const std::vector<double>& squared_quantiles(int bits) {
  static std::array<std::vector<double>, kMaxBits + 1> tables;
  static std::array<std::once_flag, kMaxBits + 1> once;
  std::call_once(once[bits], [bits] {
    const auto& grid = normal_grid();
    std::vector<double> table(size_t(1) << (bits - 1));
    int cell = 0;
    for (size_t h = 0; h < table.size(); ++h) {
      const double target = (double(h) + 0.5) / double(uint64_t(1) << bits);
      while (cell < kCells - 1 && grid[cell + 1] <= target) ++cell;
      const double z = (cell + (target - grid[cell]) / (grid[cell + 1] - grid[cell])) / kGrid;
      table[h] = z * z;
    }
    tables[bits] = std::move(table);
  });
  return tables[bits];
}

// s_n and 1 / s_n for n = m, m − 1, ..., 2 at places 0, 1, ...: element k of column j is at j + k.
struct Scales {
  std::vector<double> s, inverse;

  explicit Scales(int64_t m) : s(m), inverse(m) {
    for (int64_t i = 0; i + 1 < m; ++i) {
      const double nu = double(m - i - 1), ratio = (8 * nu + 3) / (8 * nu + 1);
      s[i] = ratio * ratio / nu;
      inverse[i] = 1.0 / s[i];
    }
  }
};

// A column of n dimensions: its vector (x, or v), n − 1 integers and room for n numbers, twice.
struct Column {
  int64_t n;
  int bits;
  double sign;   // by which x differs from the true column
  double level;  // 4 (log2 of the standard error of z + kClassOffset)
  double* vector;
  int32_t* integers;
  int32_t* classes;
  double* left;
  double* scratch;
  const double* s;          // of Scales, from the column on
  const double* quantiles;  // squared
  const double* grid;
};

// Quarters of an octave of the standard error of an estimated integer; see bitsback_corrections.h.
constexpr int kClasses = 25 + 4 * (kMaxBits - 3);
constexpr double kClassOffset = 4.0;  // class 0: 2^-4 of a bin

// v from the integers and the last sign (1 or −1).
template <class Real>
GAUGEKIT_INLINE void to_vector_body(const Column& c, double last) {
  const int64_t half = int64_t(1) << (c.bits - 1);
  for (int64_t k = 0; k + 1 < c.n; ++k) {
    const int32_t h = c.integers[k] - int32_t(half);
    c.scratch[k] = exp_minus(c.quantiles[h < 0 ? -1 - h : h] * c.s[k]);
  }
  double left = 1.0;
  for (int64_t k = 0; k + 1 < c.n; ++k) c.left[k] = left, left *= c.scratch[k];
  for (int64_t k = 0; k + 1 < c.n; ++k) {
    const double size = std::sqrt(c.left[k] * (1.0 - c.scratch[k]));
    c.vector[k] = c.integers[k] < half ? -size : size;
  }
  c.vector[c.n - 1] = last * std::sqrt(left);
}
GAUGEKIT_EACH_ISA((class Real), to_vector, (const Column& c, double last), to_vector_body<Real>(c, last))

// Integers near those that x's direction came from, and the class of each one's error. s is 1 / s_n here.
// left[0] has been ‖x‖², left[k] ‖x_{k:}‖².
template <class Real>
GAUGEKIT_INLINE void to_integers_body(const Column& c) {
  const int32_t half = int32_t(1) << (c.bits - 1);
  const double bins = double(int64_t(1) << c.bits), top = double(kClasses - 1);
  for (int64_t k = 0; k + 1 < c.n; ++k) {
    const double x = c.vector[k], after = c.left[k + 1] > 1e-290 ? c.left[k + 1] : 1e-290;
    const double ratio = x * x / after, w = ratio < 1e300 ? ratio : 1e300;
    c.scratch[k] = log_one_plus(w) * c.s[k];
  }
  for (int64_t k = 0; k + 1 < c.n; ++k) {
    const double square = c.scratch[k], place = std::sqrt(square) * kGrid;
    const double inside = place < kCells - 0.001 ? place : kCells - 0.001;
    const int32_t cell = int32_t(inside);
    const double below = c.grid[cell];
    const double u = __builtin_fma(inside - cell, c.grid[cell + 1] - below, below) * bins;
    const double most = double(half - 1), h = u < most ? u : most;
    c.integers[k] = c.sign * c.vector[k] > 0 ? half + int32_t(h) : half - 1 - int32_t(h);
    const double level = __builtin_fma(-2.8853900817779268, square, c.level);  // 4 log2 of the density
    const double low = level > 0 ? level : 0;
    c.classes[k] = int32_t(low < top ? low : top);
  }
}
GAUGEKIT_EACH_ISA((class Real), to_integers, (const Column& c), to_integers_body<Real>(c))

// left[k] = ‖x_{k:}‖².
inline void square_suffixes(const double* x, int64_t n, double* left) {
  double sum = 0;
  for (int64_t k = n - 1; k >= 0; --k) left[k] = sum = __builtin_fma(x[k], x[k], sum);
}

// 4 (log2(standard error of z) + bits + log2 of the density at 0 + kClassOffset) of a column of n dimensions
// with x of this squared length, each component of which has this variance.
inline double level_of(double variance, double square, int64_t n, int bits) {
  const double relative = variance * double(n) / (square > 1e-290 ? square : 1e-290);
  const double bounded = relative > 0x1p-60 ? (relative < 0x1p20 ? relative : 0x1p20) : 0x1p-60;
  const double log = __builtin_fma(log_one_plus(bounded * 0x1p60 - 1.0), 1.4426950408889634, -60.0);
  return 2 * log + 4 * (bits - 1.3257480647361593 + kClassOffset) + 0.5;
}

}  // namespace gaugekit::bitsback
