// Prints one line for each case in which the product on packed weights and the same product on the plain ones
// differ in a bit, and how many cases there were. Compiled and run by test_packed_linear_twin.py.
#include <cstdio>
#include <limits>
#include <random>

#include "cpu/packed_linear_encode.h"
#include "cpu/packed_linear_pairs.h"

using namespace gaugekit;
using namespace gaugekit::packed;

namespace {

uint16_t bits_of(float value, bool half) {
  return half ? narrow<1>(Vector<float, 1>{value}, Float16{})[0]
              : narrow<1>(Vector<float, 1>{value}, BFloat16{})[0];
}

// The product on pairs: few rows of x, some, and more than a pass, packed and plain, and each row of x by itself.
int compare_pairs(const Weight& w, const std::vector<uint16_t>& words, int64_t columns) {
  int cases = 0;
#ifdef GAUGEKIT_X86
  for (const int64_t batch : {1, 2, 3, 4, 5, 16, 50}) {
    std::vector<BFloat16> x(batch * columns);
    for (size_t i = 0; i < x.size(); ++i) x[i].bits = words[(i * 7) % words.size()];
    const auto run = [&](auto plain, int64_t count, const BFloat16* from, float* to) {
      const auto arranged = arrange_pairs(from, count, columns, w.blocks);
      product_of_pairs<decltype(plain)::value>(w, 0, w.rows, arranged[0].at, count,
                                               [&](int64_t t, int64_t row, Vector<float, ROWS> sums, int64_t n) {
                                                 for (int64_t i = 0; i < n; ++i) to[t * w.rows + row + i] = sums[i];
                                               });
    };
    std::vector<float> y(batch * w.rows, 1.0f), twin(batch * w.rows, 2.0f), alone(batch * w.rows, 3.0f);
    run(std::false_type{}, batch, x.data(), y.data());
    run(std::true_type{}, batch, x.data(), twin.data());
    for (int64_t t = 0; t < batch; ++t) run(std::false_type{}, 1, x.data() + t * columns, alone.data() + t * w.rows);
    cases += 2;
    // Which of two NaNs a sum takes is the compiler's choice.
    for (auto* sums : {&y, &twin, &alone})
      for (auto& sum : *sums)
        if (sum != sum) sum = std::numeric_limits<float>::quiet_NaN();
    const size_t bytes = y.size() * sizeof(float);
    if (std::memcmp(y.data(), twin.data(), bytes) || std::memcmp(y.data(), alone.data(), bytes))
      std::printf("differ: pairs, batch %d, %dx%d\n", static_cast<int>(batch), static_cast<int>(w.rows),
                  static_cast<int>(columns));
  }
#endif
  return cases;
}

int compare(int64_t rows, int64_t columns, bool half, int code_bits, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 0.02f);
  std::uniform_int_distribution<int> any(0, 65535);
  const int64_t blocks = (columns + BLOCK - 1) / BLOCK, planes = code_bits + (half ? 3 : 0);
  std::vector<uint16_t> words(rows * columns), plain(rows * blocks * BLOCK), x(MAX_BATCH * columns);
  for (auto& word : words) word = any(random) % 20 ? bits_of(normal(random), half) : any(random);
  for (auto& value : x) value = bits_of(normal(random), half);
  for (int64_t row = 0; row < rows; ++row)
    std::copy_n(words.data() + row * columns, columns, plain.data() + row * blocks * BLOCK);

  const Words from{words.data(), rows, columns, half};
  std::vector<uint8_t> raw(rows * blocks * BLOCK), window(rows);
  std::vector<uint64_t> plane(rows * planes * blocks);
  std::vector<int64_t> begins(rows + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const Survey found = survey_row(from, row);
    window[row] = static_cast<uint8_t>(found.window[code_bits - 3]);
    begins[row + 1] = begins[row] + found.escapes[code_bits - 3];
  }
  std::vector<uint8_t> escapes(begins[rows]);
  Weight w{raw.data(), plane.data(), escapes.data(), nullptr, window.data(),
           rows,       blocks,       begins[rows],   planes};
  std::vector<int32_t> offsets(rows * w.segments() + 1, static_cast<int32_t>(begins[rows]));
  w.offsets = offsets.data(), w.plain = plain.data();
  for (int64_t row = 0; row < rows; ++row)
    encode_row(words.data() + row * columns, columns, half, code_bits,
               Target{raw.data() + row * blocks * BLOCK, plane.data() + row * planes * blocks, blocks,
                      escapes.data() + begins[row], escapes.data() + begins[row + 1], window[row]},
               begins[row], offsets.data() + row * w.segments(), Isa::portable);

  int cases = 0;
  for (const Isa l : {Isa::portable, Isa::avx2, Isa::avx512, Isa::vbmi2, Isa::bf16}) {
    if (l > isa()) continue;
    for (const int64_t batch : {1, 2, 3, 5, 16}) {
      const auto arranged =
          half ? arrange(reinterpret_cast<const Float16*>(x.data()), batch, columns, blocks, half)
               : arrange(reinterpret_cast<const BFloat16*>(x.data()), batch, columns, blocks, half);
      std::vector<float> y(batch * rows, 1.0f), twin(batch * rows, 2.0f);
      product(w, 0, rows, arranged[0].at, batch, l,
              [&](int64_t t, int64_t row, float s) { y[t * rows + row] = s; });
      product<true>(w, 0, rows, arranged[0].at, batch, l,
                    [&](int64_t t, int64_t row, float s) { twin[t * rows + row] = s; });
      ++cases;
      if (std::memcmp(y.data(), twin.data(), y.size() * sizeof(float)))
        std::printf("differ: level %d, batch %d, half %d, %d code bits, %dx%d\n", static_cast<int>(l),
                    static_cast<int>(batch), half, code_bits, static_cast<int>(rows),
                    static_cast<int>(columns));
    }
  }
  return cases + (half || isa() < Isa::bf16 ? 0 : compare_pairs(w, x, columns));
}

}  // namespace

int main() {
  std::mt19937 random(0);
  int cases = 0;
  for (const bool half : {false, true})
    for (const int code_bits : {3, 4})
      for (const auto [rows, columns] : {std::pair<int, int>{1, 1}, {9, 70}, {19, 1024}, {10, 2100}, {9, 4200}})
        cases += compare(rows, columns, half, code_bits, random);
  std::printf("levels %d, cases %d\n", static_cast<int>(isa()) + 1, cases);
}
