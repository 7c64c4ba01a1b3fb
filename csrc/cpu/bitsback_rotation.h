// Rotations as integers: made, coded and recovered. Free of torch.
//
// A rotation of O(m) by p reflectors has, column by column, m − 1 − j integers and a sign. Its estimate comes
// from stored rows M ≈ R Qᵀ, R lower triangular with a positive diagonal: the QR factorisation of Mᵀ, in
// which every column is put right before the next one is looked at, so that errors do not build up. Coding
// runs the same factorisation with the true integers, and so sees what the decoder will see.
#pragma once

#include <vector>

#include "cpu/bitsback_corrections.h"
#include "cpu/canonical_qr_panel.h"

namespace gaugekit::bitsback {

struct Integers {
  int64_t p, m;
  int bits;
  int32_t* values;  // [Σ (m − 1 − j)], by columns
  int32_t* signs;   // [p], 0 or 1

  int64_t before(int64_t j) const { return j * (m - 1) - j * (j - 1) / 2; }
  int64_t count() const { return before(p); }
};

// What the columns of a rotation share.
class Columns {
 public:
  Columns(int64_t m, int bits, Isa isa)
      : isa_(isa), bits_(bits), scales_(m), left_(m + 1), scratch_(m), classes(m), estimate(m) {
    squared_quantiles(bits);
  }

  Column column(int64_t j, int64_t n, double* vector, int32_t* integers) {
    return {n,
            bits_,
            1.0,
            0.0,
            vector,
            integers,
            classes.data(),
            left_.data(),
            scratch_.data(),
            scales_.s.data() + j,
            squared_quantiles(bits_).data(),
            normal_grid().data()};
  }

  void to_vector(const Column& column, int32_t sign) const {
    GAUGEKIT_FORM(isa_, bitsback::to_vector, <double>(column, sign ? 1.0 : -1.0));
  }

  // Estimated integers into column.integers, the classes of their errors, and the last sign.
  int32_t to_integers(Column column, int64_t j, double sign, double variance) const {
    square_suffixes(column.vector, column.n, column.left);
    column.level = level_of(variance, column.left[0], column.n, column.bits);
    column.sign = sign;
    column.s = scales_.inverse.data() + j;
    GAUGEKIT_FORM(isa_, bitsback::to_integers, <double>(column));
    return sign * column.vector[column.n - 1] > 0;
  }

 private:
  const Isa isa_;
  const int bits_;
  Scales scales_;
  std::vector<double> left_, scratch_;

 public:
  std::vector<int32_t> classes, estimate;
};

// The reflectors of a rotation into `of`.
inline void make_reflectors(qr::Reflectors& of, const Integers& integers, Isa isa) {
  Columns columns(of.m, integers.bits, isa);
  double sign = 1.0;
  for (int64_t j = 0; j < of.n; ++j) {
    double* row = of.row(j) + j;
    columns.to_vector(columns.column(j, of.m - j, row, integers.values + integers.before(j)),
                      integers.signs[j]);
    of.sign[j] = sign *= qr::to_reflector(row, of.tau[j]);
  }
}

// Recovers the rotation of `of`.matrix, whose rows have these variances of rounding, with corrections popped.
inline void recover_rotation(Stack& stack, qr::Reflectors& of, const double* variance, const Integers& out,
                             const qr::Machine& machine) {
  Columns columns(of.m, out.bits, machine.isa);
  Corrections corrections(of.m, out.bits);
  qr::factor(of, machine, [&](int64_t j, double* row, int64_t n, double sign) {
    int32_t* values = out.values + out.before(j);
    const Column column = columns.column(j, n, row, values);
    const int32_t last = columns.to_integers(column, j, sign, variance[j]);
    corrections.pop(stack, column.classes, values, n - 1);
    out.signs[j] = last ^ int32_t(corrections.pop_turn(stack));
    columns.to_vector(column, out.signs[j]);
  });
}

// Pushes the corrections that recover_rotation will need.
inline void correct_rotation(Stack& stack, qr::Reflectors& of, const double* variance, const Integers& in,
                             const qr::Machine& machine) {
  Columns columns(of.m, in.bits, machine.isa);
  std::vector<int32_t> errors(in.count());
  std::vector<uint8_t> classes(in.count()), turned(of.n);
  qr::factor(of, machine, [&](int64_t j, double* row, int64_t n, double sign) {
    const int64_t first = in.before(j);
    Column column = columns.column(j, n, row, columns.estimate.data());
    turned[j] = uint8_t(columns.to_integers(column, j, sign, variance[j]) != in.signs[j]);
    for (int64_t k = 0; k + 1 < n; ++k) {
      errors[first + k] = column.integers[k] - in.values[first + k];
      classes[first + k] = uint8_t(column.classes[k]);
    }
    column.integers = in.values + first;
    columns.to_vector(column, in.signs[j]);
  });
  Corrections corrections(of.m, in.bits);
  for (int64_t j = of.n - 1; j >= 0; --j) {
    const int64_t first = in.before(j), n = of.m - j;
    corrections.push_turn(stack, turned[j]);
    for (int64_t k = 0; k + 1 < n; ++k) columns.classes[k] = classes[first + k];
    corrections.push(stack, columns.classes.data(), errors.data() + first, n - 1);
  }
}

}  // namespace gaugekit::bitsback
