// Prints one line for each case in which the product on packed weights and the same product on the plain ones
// differ in a bit, in which two instruction sets do, or in which a sum is not the exact one but for rounding;
// and then how many cases there were. Compiled and run by test_packed_linear_twin.py, for ARM in an emulator
// too.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "cpu/packed_linear_encode.h"
#include "cpu/packed_linear_outputs.h"
#include "packed_linear_matrix.h"

using namespace gaugekit;
using namespace gaugekit::packed;

namespace {

int cases = 0;
int64_t checked = 0;           // sums held against the exact ones
uint32_t digest = 0x811c9dc5;  // of the sums in the order that every processor has

float value_of(uint16_t bits, bool half) {
  return half ? gaugekit::widen<1>(Vector<uint16_t, 1>{bits}, Float16{})[0]
              : bits_as<float>(uint32_t(bits) << 16);
}

void differ(const Matrix& m, const char* what, int level, int64_t batch) {
  std::printf("differ: %s, level %d, batch %d, kind %d, %d code bits, %dx%d\n", what, level,
              static_cast<int>(batch), static_cast<int>(m.kind), m.code_bits, static_cast<int>(m.rows),
              static_cast<int>(m.columns));
}

using Sums = std::vector<float>;

// Which of two NaNs a sum takes is the compiler's choice.
bool same(Sums a, Sums b) {
  for (auto* sums : {&a, &b})
    for (auto& sum : *sums)
      if (sum != sum) sum = std::numeric_limits<float>::quiet_NaN();
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Whether all sums that are numbers are near the exact ones: the rounding of 4,200 additions in 32 to 64
// strands stays far below the bound, and a wrong pairing far above. x_half: x is float16.
bool exact(const Matrix& m, const uint16_t* x, bool x_half, int64_t batch, const Sums& y) {
  bool near = true;
  for (int64_t t = 0; t < batch; ++t)
    for (int64_t row = 0; row < m.rows; ++row) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < m.columns; ++k) {
        const double product = double(value_of(m.words[row * m.columns + k], m.half)) *
                               double(value_of(x[t * m.columns + k], x_half));
        sum += product, size += std::abs(product);
      }
      if (!(size < 1e38)) continue;
      ++checked;
      near = near && std::abs(y[t * m.rows + row] - sum) <= size * 0x1p-12 + 1e-35;
    }
  return near;
}

// The product on pairs: few rows of x, some, and more than a pass, packed and plain, and each row of x by
// itself. E5M2's plain twin is the same numbers in bfloat16.
void compare_pairs([[maybe_unused]] const Matrix& m, [[maybe_unused]] const std::vector<uint16_t>& words) {
#ifdef GAUGEKIT_PAIRS
  const bool e5m2 = m.kind == Kind::e5m2;
  if (isa() < PAIRS_LEVEL || (e5m2 ? !PAIRS_OF_E5M2 : m.half)) return;
  Weight w = m.weight();
  std::vector<uint16_t> widened(m.plain);
  for (auto& word : widened)
    if (e5m2) word = static_cast<uint16_t>(bits_as<uint32_t>(value_of(word, true)) >> 16);
  w.plain = widened.data();
  for (const int64_t batch : {1, 2, 3, 4, 5, 16, 50}) {
    std::vector<uint16_t> x(batch * m.columns);
    for (size_t i = 0; i < x.size(); ++i) x[i] = words[(i * 7) % words.size()];
    const auto run = [&](auto plain, int64_t count, const uint16_t* from, float* to) {
      const auto arranged =
          arrange_pairs(reinterpret_cast<const BFloat16*>(from), count, m.columns, w.blocks);
      product_of_pairs<decltype(plain)::value>(
          w, 0, m.rows, arranged[0].at, count,
          [&](int64_t t, int64_t row, Vector<float, ROWS> sums, int64_t n) {
            for (int64_t i = 0; i < n; ++i) to[t * m.rows + row + i] = sums[i];
          });
    };
    Sums y(batch * m.rows, 1.0f), twin(batch * m.rows, 2.0f), alone(batch * m.rows, 3.0f);
    run(std::false_type{}, batch, x.data(), y.data());
    run(std::true_type{}, batch, x.data(), twin.data());
    for (int64_t t = 0; t < batch; ++t)
      run(std::false_type{}, 1, x.data() + t * m.columns, alone.data() + t * m.rows);
    cases += 3;
    const int level = static_cast<int>(isa());
    if (!same(y, twin)) differ(m, "pairs from plain", level, batch);
    if (!same(y, alone)) differ(m, "pairs from rows alone", level, batch);
    if (!exact(m, x.data(), false, batch, y)) differ(m, "pairs from exact", level, batch);
#ifdef GAUGEKIT_X86
    const auto even = arrange_rows(x.data(), batch, m.columns);
    const auto outputs = [&](auto plain, float* to) {
      product_of_outputs<decltype(plain)::value>(
          w, 0, m.rows, m.columns % 2 ? even[0].at : x.data(), m.columns + m.columns % 2, batch,
          [&](int64_t t, int64_t row, Vector<float, ROWS> sums, int64_t n) {
            for (int64_t i = 0; i < n; ++i) to[t * m.rows + row + i] = sums[i];
          });
    };
    outputs(std::false_type{}, y.data());
    outputs(std::true_type{}, twin.data());
    cases += 2;
    if (!same(y, twin)) differ(m, "outputs from plain", level, batch);
    if (!exact(m, x.data(), false, batch, y)) differ(m, "outputs from exact", level, batch);
#endif
  }
#endif
}

void compare_rows(const Matrix& m, Isa l) {
  std::vector<uint16_t> out(m.columns);
  std::vector<uint8_t> high(m.columns);
  ++cases;
  for (int64_t row = 0; row < m.rows; ++row) {
    decode_row(m.weight(), row, m.columns, out.data(), l);
    if (m.kind == Kind::e5m2) {
      decode_row(m.weight(), row, m.columns, high.data(), l);
      for (int64_t k = 0; k < m.columns; ++k)
        if (out[k] != high[k] << 8) return differ(m, "decoded bytes", static_cast<int>(l), row);
    }
    if (!std::equal(out.begin(), out.end(), m.words.begin() + row * m.columns))
      return differ(m, "decoded words", static_cast<int>(l), row);
  }
}

void compare(const Matrix& m, std::mt19937& random) {
  const Weight w = m.weight();
  std::vector<uint16_t> x(MAX_BATCH * m.columns);
  for (auto& value : x) value = word_near_zero(random, m.half);
  for (const int64_t batch : {1, 2, 3, 5, 16}) {
    const auto arranged =
        m.half ? arrange(reinterpret_cast<const Float16*>(x.data()), batch, m.columns, w.blocks, true)
               : arrange(reinterpret_cast<const BFloat16*>(x.data()), batch, m.columns, w.blocks, false);
    Sums portable;
    for (int level = 0; level <= static_cast<int>(isa()); ++level) {
      Sums y(batch * m.rows, 1.0f), twin(batch * m.rows, 2.0f);
      product(w, 0, m.rows, arranged[0].at, batch, Isa(level),
              [&](int64_t t, int64_t row, float s) { y[t * m.rows + row] = s; });
      product<true>(w, 0, m.rows, arranged[0].at, batch, Isa(level),
                    [&](int64_t t, int64_t row, float s) { twin[t * m.rows + row] = s; });
      if (level == 0) portable = y;
      ++cases;
      if (!same(y, twin)) differ(m, "packed from plain", level, batch);
      if (!same(y, portable)) differ(m, "level from portable", level, batch);
    }
    if (!exact(m, x.data(), m.half, batch, portable)) differ(m, "portable from exact", 0, batch);
    for (const float sum : portable)
      if (sum == sum) digest = (digest ^ bits_as<uint32_t>(sum)) * 0x01000193;
  }
  for (int level = 0; level <= static_cast<int>(isa()); ++level) compare_rows(m, Isa(level));
  if (m.kind == Kind::e5m2)
    for (auto& value : x) value = word_near_zero(random, false);
  compare_pairs(m, x);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (const Kind kind : {Kind::bfloat16, Kind::float16, Kind::e5m2})
    for (const int code_bits : {3, 4})
      for (const auto& [rows, columns] :
           {std::pair<int, int>{1, 1}, {9, 70}, {19, 1024}, {10, 2100}, {9, 4200}})
        compare(Matrix(rows, columns, kind, code_bits, random), random);
  std::printf("levels %d, cases %d, checked %d, digest %u\n", static_cast<int>(isa()) + 1, cases,
              static_cast<int>(checked), digest);
}
