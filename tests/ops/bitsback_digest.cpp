// Prints what the factorisation and the code of a rotation give, for every instruction set of this processor
// and one and two threads: test_bitsback_digest.py compiles it in several ways and compares.
#include <cinttypes>
#include <cstdio>

#include "cpu/bitsback_rotation.h"

using namespace gaugekit;
using namespace gaugekit::bitsback;

namespace {

uint64_t hashed(uint64_t hash, const void* data, size_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 0x100000001b3;
  return hash;
}

double number(int64_t i) { return double((i * i % 10007 + i * 7919) % 10007 - 5003) / 1024; }

// QR with a positive diagonal of a matrix of m by n: what is left of it.
uint64_t factored(int64_t n, int64_t m, const qr::Machine& machine) {
  std::vector<double> rows(n * m);
  for (int64_t i = 0; i < n * m; ++i) rows[i] = number(i);
  qr::Reflectors reflectors(rows.data(), n, m);
  qr::factor(reflectors, machine, [&](int64_t, double* row, int64_t size, double sign) {
    double square;
    GAUGEKIT_FORM(machine.isa, qr::products, <double>({row, 0, row, size, size, 1}, &square));
    const double norm = std::sqrt(square);
    for (int64_t k = 0; k < size; ++k) row[k] = sign * row[k] / norm;
  });
  return hashed(0xcbf29ce484222325, rows.data(), rows.size() * sizeof(double));
}

// A rotation by its integers, rounded to 12 bits, corrected, and recovered; 0 where it does not come back.
uint64_t coded(int64_t p, int64_t m, int bits, const qr::Machine& machine) {
  Integers in{p, m, bits, nullptr, nullptr};
  std::vector<int32_t> values(in.count()), signs(p), again(in.count()), signs_again(p);
  in.values = values.data(), in.signs = signs.data();
  for (int64_t i = 0; i < in.count(); ++i)
    values[i] = int32_t(uint64_t(i * 2654435761) >> 7) & ((1 << bits) - 1);
  for (int64_t j = 0; j < p; ++j) signs[j] = int32_t(j * j % 3 == 0);
  std::vector<double> matrix(p * m), rows(p * m, 0.0), variance(p, 0x1p-24 / 3);
  qr::Reflectors reflectors(matrix.data(), p, m);
  make_reflectors(reflectors, in, machine.isa);
  for (int64_t j = 0; j < p; ++j)  // a lower triangle with a positive diagonal
    for (int64_t i = 0; i <= j; ++i) rows[j * m + i] = i == j ? 4.0 + double(j % 3) : number(i + j) / 64;
  qr::apply_transposed(reflectors, false, rows.data(), p, machine);
  for (double& x : rows) x = std::round(x * 2048) / 2048;
  std::vector<uint16_t> words(3 * in.count() + 64);
  Stack stack{words.data(), 0, int64_t(words.size()), 0, true, false, {}};
  for (int i = 0; i < kCoders; ++i) stack.states[i] = first_state(i);
  std::vector<double> copy = rows;
  qr::Reflectors coding(copy.data(), p, m), recovering(rows.data(), p, m);
  correct_rotation(stack, coding, variance.data(), in, machine);
  uint64_t hash = hashed(0xcbf29ce484222325, words.data(), stack.size * 2);
  hash = hashed(hash, stack.states, sizeof(stack.states));
  stack.seeded = false;
  recover_rotation(stack, recovering, variance.data(), {p, m, bits, again.data(), signs_again.data()},
                   machine);
  return !stack.failed && again == values && signs_again == signs ? hash : 0;
}

}  // namespace

int main() {
  constexpr int kForms = 3;  // levels for which there is a form here
  for (int level = 0; level < kForms; ++level) {
    if (Isa(level) > isa()) break;
    for (int64_t threads : {1, 2}) {
      const qr::Machine machine{Isa(level), threads};
      std::printf("%" PRIx64 " %" PRIx64 " %" PRIx64 "\n", factored(150, 161, machine),
                  coded(150, 161, 16, machine), coded(70, 70, 10, machine));
    }
  }
}
