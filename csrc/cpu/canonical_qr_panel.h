// Blocked Householder elimination in which every reflector comes from a given direction, and the product of
// such reflectors applied to rows. Free of torch; the order of every sum is fixed (canonical_qr_lanes.h).
//
// The matrix Mᵀ = Q R is held as the rows of M: row j of `matrix` is column j of what is factored. At row j,
// with the reflectors before it applied, x = row[j:] is handed to `direction`, which says the unit vector v
// that F_j = s_j (I − tau u uᵀ) shall send e_1 to: u = v ± e_1 and s_j are such that nothing cancels. For QR
// v = x/‖x‖. Q = F_0 F_1 ...; the signs commute with all later reflectors, so that the rows are kept without
// them.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/turns.h"
#include "cpu/canonical_qr_lanes.h"

namespace gaugekit::qr {

constexpr int64_t kPanel = 64, kRowBlock = 24, kDepth = 256;

// n reflectors of a space of m dimensions: u_j is row j from column j on, before it stands what elimination
// leaves.
struct Reflectors {
  double* matrix;  // [n, m]
  int64_t n, m;
  std::vector<double> tau, sign;  // [n]; sign[j] = s_0 ··· s_j

  Reflectors(double* rows, int64_t count, int64_t width)
      : matrix(rows), n(count), m(width), tau(count), sign(count) {}
  double* row(int64_t j) const { return matrix + j * m; }
};

// Doubles that begin with a line of the cache, zero at first.
class Lines {
 public:
  void assign(int64_t count) {
    storage_.assign(count + 8, 0.0);
    void* place = storage_.data();
    size_t space = storage_.size() * sizeof(double);
    data_ = static_cast<double*>(std::align(64, count * sizeof(double), place, space));
  }
  double* data() { return data_; }
  const double* data() const { return data_; }

 private:
  std::vector<double> storage_;
  double* data_ = nullptr;
};

// The reflectors j0 to j0 + b - 1 as I − V T Vᵀ, of the columns from j0 on, in the layouts that tiles take.
struct Panel {
  int64_t first, b, width;  // width of V: m − first
  int64_t padded;           // to whole tiles
  Lines down, across, t;    // V as [b/8][width][8]; Vᵀ as [width/8][b][8]; T or Tᵀ as [b/8][64][8]
};

// --- what is compiled for each instruction set ---
struct Eliminated {
  const double* u;
  double tau;
  double* rows;
  int64_t stride, n, count;
};

template <class Real, int W>
GAUGEKIT_INLINE void eliminate_body(const Eliminated& e) {
  reflect_rows<W>(e.u, e.tau, e.rows, e.stride, e.n, e.count);
}
GAUGEKIT_EACH_ISA((class Real), eliminate, (const Eliminated& e), eliminate_body<Real, BYTES / 8>(e))

// sums[i] = u · rows[i], of rows that begin at the same column.
template <class Real, int W>
GAUGEKIT_INLINE void products_body(const Eliminated& e, double* sums) {
  int64_t r = 0;
  for (; r + 4 <= e.count; r += 4) {
    double four[4];
    dots<4, W>(e.u, e.rows + r * e.stride, e.stride, e.n, four);
    for (int i = 0; i < 4; ++i) sums[r + i] = four[i];
  }
  for (; r < e.count; ++r) {
    double single[1];
    dots<1, W>(e.u, e.rows + r * e.stride, e.stride, e.n, single);
    sums[r] = single[0];
  }
}
GAUGEKIT_EACH_ISA((class Real), products, (const Eliminated& e, double* sums),
                  products_body<Real, BYTES / 8>(e, sums))

// rows[:, :width] -= ((rows V) T) Vᵀ for at most kRowBlock rows.
template <class Real, int W>
GAUGEKIT_INLINE void update_body(const Panel& panel, double* rows, int64_t stride, int64_t count) {
  alignas(64) double product[kRowBlock * kPanel] = {}, scaled[kRowBlock * kPanel] = {};
  const int64_t b = (panel.b + 7) / 8 * 8, width = panel.width;
  for (int64_t k = 0; k < width; k += kDepth)
    for (int64_t i = 0; i < b; i += 8)
      tiles<W>(rows + k, stride, panel.down.data() + i * width + k * 8, product + i, kPanel,
               std::min(kDepth, width - k), count);
  for (int64_t i = 0; i < b; i += 8)
    tiles<W>(product, kPanel, panel.t.data() + i * kPanel, scaled + i, kPanel, b, count);
  for (int64_t i = 0; i < count * kPanel; ++i) scaled[i] = -scaled[i];
  for (int64_t k = 0; k + 8 <= width; k += 8)
    tiles<W>(scaled, kPanel, panel.across.data() + k * b, rows + k, stride, b, count);
  const int64_t whole = width / 8 * 8, rest = width - whole;
  if (rest == 0) return;
  double tail[kRowBlock * 8] = {};
  for (int64_t r = 0; r < count; ++r)
    for (int64_t k = 0; k < rest; ++k) tail[r * 8 + k] = rows[r * stride + whole + k];
  tiles<W>(scaled, kPanel, panel.across.data() + whole * b, tail, 8, b, count);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t k = 0; k < rest; ++k) rows[r * stride + whole + k] = tail[r * 8 + k];
}
GAUGEKIT_EACH_ISA((class Real), update, (const Panel& panel, double* rows, int64_t stride, int64_t count),
                  update_body<Real, BYTES / 8>(panel, rows, stride, count))

// Where rows are updated: how many threads, with which instructions.
struct Machine {
  Isa isa;
  int64_t threads;

  void update(const Panel& panel, double* rows, int64_t stride, int64_t count) const {
    const double block_ns = 0.16 * double(kRowBlock * panel.width) * double(panel.b);
    take_ranges(count, kRowBlock, threads, block_ns, [&](int64_t begin, int64_t end) {
      GAUGEKIT_FORM(isa, qr::update, <double>(panel, rows + begin * stride, stride, end - begin));
    });
  }
};

// T of H_0 ··· H_{b−1} = I − V T Vᵀ: column i is −tau_i T (Vᵀ u_i) above tau_i.
inline void fill_panel(Panel& panel, const Reflectors& of, int64_t first, bool backwards, Isa isa) {
  const int64_t b = std::min(kPanel, of.n - first), width = of.m - first, b8 = (b + 7) / 8 * 8;
  panel.first = first, panel.b = b, panel.width = width, panel.padded = (width + 7) / 8 * 8;
  std::vector<double> v(b * panel.padded, 0.0);  // the u's, zero before their own column
  for (int64_t i = 0; i < b; ++i)
    std::copy(of.row(first + i) + first + i, of.row(first + i) + of.m, v.begin() + i * panel.padded + i);
  panel.down.assign(b8 * width), panel.across.assign(panel.padded * b8);
  for (int64_t i = 0; i < b; ++i) {
    const double* u = v.data() + i * panel.padded;
    double* down = panel.down.data() + i / 8 * 8 * width + i % 8;
    for (int64_t k = 0; k < width; ++k) down[8 * k] = u[k];
  }
  for (int64_t k = 0; k < panel.padded; k += 8)
    for (int64_t i = 0; i < b; ++i)
      std::memcpy(panel.across.data() + k * b8 + i * 8, &v[i * panel.padded + k], 8 * sizeof(double));
  double t[kPanel][kPanel] = {}, dot[kPanel];
  for (int64_t i = 0; i < b; ++i) {
    const double tau = of.tau[first + i];
    const Eliminated pairs{v.data() + i * panel.padded + i, tau, v.data() + i, panel.padded, width - i, i};
    GAUGEKIT_FORM(isa, products, <double>(pairs, dot));
    for (int64_t r = 0; r < i; ++r) {
      double sum = 0;
      for (int64_t k = r; k < i; ++k) sum = std::fma(t[r][k], dot[k], sum);
      t[r][i] = -(tau * sum);
    }
    t[i][i] = tau;
  }
  panel.t.assign(b8 * kPanel);
  for (int64_t r = 0; r < b; ++r)
    for (int64_t i = 0; i < b; ++i)
      panel.t.data()[i / 8 * 8 * kPanel + r * 8 + i % 8] = backwards ? t[i][r] : t[r][i];
}

// Turns the unit vector v in row[0, len) into the u of its reflector; returns s, sets tau.
inline double to_reflector(double* row, double& tau) {
  const double first = row[0], s = first > 0 ? -1.0 : 1.0;
  row[0] = first > 0 ? first + 1.0 : first - 1.0;
  tau = 1.0 / (first > 0 ? 1.0 + first : 1.0 - first);
  return s;
}

// Eliminates `of`.matrix in place. direction(j, row, len, sign) puts v where x is; `sign` is the one by which
// x differs from the true column.
template <class Direction>
void factor(Reflectors& of, const Machine& machine, Direction&& direction) {
  Panel panel;
  double sign = 1.0;
  for (int64_t first = 0; first < of.n; first += kPanel) {
    const int64_t end = std::min(of.n, first + kPanel);
    for (int64_t j = first; j < end; ++j) {
      double* row = of.row(j) + j;
      direction(j, row, of.m - j, sign);
      sign *= to_reflector(row, of.tau[j]);
      of.sign[j] = sign;
      const Eliminated rest{row, of.tau[j], row + of.m, of.m, of.m - j, end - j - 1};
      GAUGEKIT_FORM(machine.isa, eliminate, <double>(rest));
    }
    if (end == of.n) break;
    fill_panel(panel, of, first, false, machine.isa);
    machine.update(panel, of.row(end) + first, of.m, of.n - end);
  }
}

// rows ← rows Qᵀ, of `count` rows with of.m columns each; `identity` says that they are the first rows of I:
// until a panel comes to a row, it has nothing from that panel's first column on.
inline void apply_transposed(const Reflectors& of, bool identity, double* rows, int64_t count,
                             const Machine& machine) {
  if (of.n == 0) return;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < of.m; ++i) rows[r * of.m + i] *= of.sign[std::min(i, of.n - 1)];
  Panel panel;
  for (int64_t first = (of.n - 1) / kPanel * kPanel; first >= 0; first -= kPanel) {
    fill_panel(panel, of, first, true, machine.isa);
    const int64_t skipped = identity ? std::min(first, count) : 0;
    machine.update(panel, rows + skipped * of.m + first, of.m, count - skipped);
  }
}

}  // namespace gaugekit::qr
