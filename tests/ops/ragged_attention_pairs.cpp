// The vector work of ragged_attention_pairs.h beside scalar models of it: layouts word by word, products bit
// for bit in the instruction's order, exponentials to their bound. Prints a line for each case that differs,
// and how many cases there were. Compiled and run by test_ragged_attention_twin.py.
#include "cpu/ragged_attention_pairs_backward.h"
#include "cpu/ragged_attention_pairs_forward.h"
#include "pair_models.h"

using namespace gaugekit;

namespace {

#ifdef GAUGEKIT_X86
void compare_layouts(int64_t rows, int64_t columns, std::mt19937& random) {
  const int64_t step = columns + 3, pairs = pairs_of(columns), stride = padded_words(pairs);
  const std::vector<BFloat16> x = numbers(rows * step, random);
  const PairSource source{x.data(), step, rows, columns};
  const auto at = [&](int64_t r, int64_t c) -> Words {
    return r < rows && c < columns ? x[r * step + c].bits : 0;
  };
  Buffer<Words> lying(EDGE * stride), turned(pairs * EDGE), rowwise(PAIRS * padded_words(columns));
  pair_columns(source, lying.data(), stride);
  turn_pairs(source, turned.data());
  pair_rows(source, rowwise.data(), padded_words(columns), EDGE);
  bool same[3] = {true, true, true};
  for (int64_t r = 0; r < EDGE; ++r)
    for (int64_t p = 0; p < stride; ++p) {
      const Words pair = at(r, 2 * p) | at(r, 2 * p + 1) << 16;
      if (r < rows) same[0] &= lying[r * stride + p] == pair;
      if (p < pairs) same[1] &= turned[p * EDGE + r] == pair;
    }
  for (int64_t r = 0; r < EDGE; r += 2)
    for (int64_t c = 0; c < padded_words(columns); ++c)
      same[2] &= rowwise[r / 2 * padded_words(columns) + c] == (at(r, c) | at(r + 1, c) << 16);
  check(same[0], "pair_columns", rows, columns);
  check(same[1], "turn_pairs", rows, columns);
  check(same[2], "pair_rows", rows, columns);
}

void compare_products(int64_t rows, int64_t depth, int64_t width, bool turned, std::mt19937& random) {
  const int64_t row = turned ? 1 : depth + 1, step = turned ? EDGE : 1;
  const std::vector<BFloat16> left = numbers(2 * EDGE * (depth + 1), random);
  const std::vector<BFloat16> right = numbers(2 * depth * width, random);
  Buffer<Words> a(EDGE * (depth + 1)), b(depth * width);
  std::memcpy(a.data(), left.data(), left.size() * sizeof(BFloat16));
  std::memcpy(b.data(), right.data(), right.size() * sizeof(BFloat16));
  for (const bool keeps : {false, true}) {
    Buffer<float> c(EDGE * width), keep(EDGE);
    for (int64_t i = 0; i < EDGE * width; ++i) c[i] = std::normal_distribution<float>()(random);
    for (int64_t i = 0; i < EDGE; ++i) keep[i] = std::normal_distribution<float>()(random);
    std::vector<float> model(c.data(), c.data() + EDGE * width);
    multiply_pairs(
        {a.data(), row, step, b.data(), width, depth, rows, c.data(), keeps ? keep.data() : nullptr});
    bool same = true;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < width; ++n) {
        float sum = keeps ? keep[r] * model[r * width + n] : 0;
        for (int64_t p = 0; p < depth; ++p) sum = pair_added(sum, a[r * row + p * step], b[p * width + n]);
        same &= bits_as<uint32_t>(sum) == bits_as<uint32_t>(c[r * width + n]);
      }
    check(same, turned ? "product of columns" : "product of rows", rows, width);
  }
}

GAUGEKIT_BF16 float two_to(float x) { return _mm512_cvtss_f32(two_to_the(_mm512_set1_ps(x))); }

void compare_exponentials() {
  bool near = true;
  for (float x = -125; x <= 125; x += 0.0137f) near &= std::abs(two_to(x) / std::exp2(double(x)) - 1) < 4e-7;
  check(near, "two_to_the", 1, 1);
  const float least = -std::numeric_limits<float>::infinity(), far = std::numeric_limits<float>::lowest() / 2;
  check(two_to(0) == 1 && two_to(least) == 0 && two_to(far) == 0 && std::isnan(two_to(std::nanf(""))),
        "two_to_the at the ends", 1, 1);
}
#endif

}  // namespace

int main() {
#ifdef GAUGEKIT_X86
  std::mt19937 random(0);
  if (isa() >= Isa::bf16) {
    for (const int64_t rows : {1, 2, 17, 47, 48})
      for (const int64_t columns : {1, 2, 15, 16, 31, 33, 64, 100}) compare_layouts(rows, columns, random);
    for (const int64_t rows : {1, 7, 24, 48})
      for (const int64_t depth : {1, 5, 24})
        for (const int64_t width : {16, 32, 48, 64, 80, 128})
          for (const bool turned : {false, true}) compare_products(rows, depth, width, turned, random);
    compare_exponentials();
  }
  std::printf("levels %d, cases %d\n", static_cast<int>(isa()) + 1, cases);
#else
  std::printf("levels 1, cases 0\n");
#endif
}
