// gaugekit::canonical_qr on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "canonical_qr_panel.h"
#include "common/check.h"

namespace gaugekit::qr {
namespace {

// The direction of QR with a positive diagonal: x/‖x‖, of a zero column e_1.
struct Own {
  double* norms;
  Isa isa;

  void operator()(int64_t j, double* row, int64_t n, double sign) const {
    double square;
    GAUGEKIT_FORM(isa, products, <double>({row, 0, row, n, n, 1}, &square));
    const double norm = norms[j] = std::sqrt(square);
    for (int64_t k = 0; k < n; ++k) row[k] = norm > 0 ? sign * row[k] / norm : double(k == 0);
  }
};

std::tuple<Tensor, Tensor> canonical_qr(const Tensor& matrix, int64_t path) {
  STD_TORCH_CHECK(-1 <= path && path <= 2, "path: expected -1 to 2");
  check_dtype("matrix", matrix, ScalarType::Double);
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) >= matrix.size(1),
                  "matrix: expected two axes, the first not the shorter");
  const int64_t m = matrix.size(0), n = matrix.size(1);
  const Tensor rows = torch::stable::clone(torch::stable::contiguous(torch::stable::transpose(matrix, 0, 1)));
  const Tensor q = torch::stable::empty({n, m}, ScalarType::Double);
  const Tensor r = torch::stable::empty({n, n}, ScalarType::Double);
  const Machine machine{path < 0 ? isa() : std::min(Isa(path), isa()), torch::stable::get_num_threads()};
  Reflectors reflectors(static_cast<double*>(rows.mutable_data_ptr()), n, m);
  std::vector<double> norms(n);
  qr::factor(reflectors, machine, Own{norms.data(), machine.isa});
  double* out = static_cast<double*>(r.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      out[i * n + j] = j < i ? 0.0 : j == i ? norms[i] : reflectors.sign[i] * reflectors.row(j)[i] + 0.0;
  // Rows of the identity times Qᵀ: its first n columns, transposed.
  double* columns = static_cast<double*>(q.mutable_data_ptr());
  std::fill(columns, columns + n * m, 0.0);
  for (int64_t i = 0; i < n; ++i) columns[i * m + i] = 1.0;
  apply_transposed(reflectors, true, columns, n, machine);
  return {torch::stable::transpose(q, 0, 1), r};
}

}  // namespace
}  // namespace gaugekit::qr

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("canonical_qr", TORCH_BOX(&gaugekit::qr::canonical_qr));
}
