// The products of packed_linear_pairs.h, packed_linear_outputs.h and packed_linear_amx.h beside scalar models
// of their instructions, bit for bit, in the order of summation that those headers write down. Prints a line
// for each case that differs, and how many cases there were. Compiled and run by test_packed_linear_twin.py.
#include <cmath>
#include <cstdio>
#include <limits>

#include "cpu/packed_linear_amx.h"
#include "cpu/packed_linear_outputs.h"
#include "packed_linear_matrix.h"

using namespace gaugekit;
using namespace gaugekit::packed;

namespace {

#ifdef GAUGEKIT_X86
// Both instructions take subnormal numbers for zeros, before and after, and round to nearest.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
float widened(uint16_t word) { return flushed(bits_as<float>(uint32_t(word) << 16)); }
float product_added(float sum, uint16_t a, uint16_t b) {
  return flushed(std::fma(widened(a), widened(b), flushed(sum)));
}
float added(float a, float b) { return flushed(flushed(a) + flushed(b)); }

// vdpbf16ps, of one sum: the odd product first.
float pair_added(float sum, const uint16_t* a, const uint16_t* b) {
  return product_added(product_added(sum, a[1], b[1]), a[0], b[0]);
}

// tdpbf16ps, of one sum and the words of two half blocks: even and odd products each in a sum of its own.
float half_block_added(float sum, const uint16_t* a, const uint16_t* b) {
  float even = 0, odd = 0;
  for (int k = 0; k < HALF_BLOCK; k += 2) {
    even = product_added(even, a[k], b[k]);
    odd = product_added(odd, a[k + 1], b[k + 1]);
  }
  return added(sum, added(even, odd));
}

// The tile registers, emulated.
class Emulated {
 public:
  template <int N>
  void zero() {
    std::memset(tile_[N], 0, sizeof(tile_[N]));
  }
  template <int N>
  void load(const void* from, int64_t stride_bytes) {
    for (int row = 0; row < SIDE; ++row)
      std::memcpy(tile_[N][row], static_cast<const char*>(from) + row * stride_bytes, 64);
  }
  template <int N>
  void store(void* to, int64_t stride_bytes) {
    for (int row = 0; row < SIDE; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride_bytes, tile_[N][row], 64);
  }
  template <int C, int A, int B>
  void add_products() {
    for (int m = 0; m < SIDE; ++m)
      for (int n = 0; n < SIDE; ++n) {
        uint16_t column[HALF_BLOCK];
        for (int k = 0; k < SIDE; ++k) std::memcpy(column + 2 * k, tile_[B][k] + 2 * n, 2 * sizeof(uint16_t));
        float sum;
        std::memcpy(&sum, tile_[C][m] + 2 * n, sizeof(sum));
        sum = half_block_added(sum, tile_[A][m], column);
        std::memcpy(tile_[C][m] + 2 * n, &sum, sizeof(sum));
      }
  }

 private:
  uint16_t tile_[8][SIDE][HALF_BLOCK];
};

// A row's words as the products hold them: [blocks][2][32], zero beyond its columns.
std::vector<uint16_t> in_halves(const uint16_t* row, int64_t columns, int64_t blocks) {
  std::vector<uint16_t> halves(blocks * BLOCK);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t place = i % BLOCK, half = place / 8 % 2;
    halves[i / BLOCK * BLOCK + half * HALF_BLOCK + place / 16 * 8 + place % 8] = row[i];
  }
  return halves;
}

float modelled_pairs(const std::vector<uint16_t>& w, const std::vector<uint16_t>& x, int64_t blocks) {
  float sum[16] = {};
  for (int64_t i = 0; i < 2 * blocks; ++i)
    for (int j = 0; j < 16; ++j)
      sum[j] = pair_added(sum[j], &w[i * HALF_BLOCK + 2 * j], &x[i * HALF_BLOCK + 2 * j]);
  for (int width = 8; width; width /= 2)
    for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
  return sum[0];
}

// Of the rows as they are, `columns` words each.
float modelled_outputs(const uint16_t* w, const uint16_t* x, int64_t columns) {
  float sum = 0;
  for (int64_t k = 0; k < columns; k += 2) {
    const uint16_t a[2] = {w[k], k + 1 < columns ? w[k + 1] : uint16_t(0)};
    const uint16_t b[2] = {x[k], k + 1 < columns ? x[k + 1] : uint16_t(0)};
    sum = pair_added(sum, a, b);
  }
  return sum;
}

float modelled_tiles(const std::vector<uint16_t>& w, const std::vector<uint16_t>& x, int64_t blocks) {
  float sum = 0;
  for (int64_t i = 0; i < 2 * blocks; ++i)
    sum = half_block_added(sum, &w[i * HALF_BLOCK], &x[i * HALF_BLOCK]);
  return sum;
}

// Which of two NaNs a sum takes is the compiler's choice, and they stand for each other.
bool same(float a, float b) { return a != a ? b != b : bits_as<uint32_t>(a) == bits_as<uint32_t>(b); }

int compare(int64_t rows, int64_t columns, int code_bits, int64_t batch, int odd_ones, std::mt19937& random) {
  const Matrix w(rows, columns, false, code_bits, random, odd_ones),
      x(batch, columns, false, 3, random, odd_ones);
  const Weight weight = w.weight();
  const int64_t blocks = w.blocks();
  const auto arranged =
      arrange_pairs(reinterpret_cast<const BFloat16*>(x.words.data()), batch, columns, blocks);
  const auto tiles = arrange_tiles(arranged[0].at, batch, blocks);
  std::vector<float> by_pairs(batch * rows), by_outputs(batch * rows), by_tiles(batch * rows);
  const auto into = [rows](std::vector<float>& y) {
    return [&y, rows](int64_t t, int64_t row, Vector<float, ROWS> sums, int64_t count) {
      for (int64_t i = 0; i < count; ++i) y[t * rows + row + i] = sums[i];
    };
  };
  product_of_pairs(weight, 0, rows, arranged[0].at, batch, into(by_pairs));
  product_of_tiles<Emulated>(weight, 0, rows, tiles[0].at, batch, into(by_tiles));
  const auto even = arrange_rows(x.words.data(), batch, columns);
  product_of_outputs(weight, 0, rows, columns % 2 ? even[0].at : x.words.data(), columns + columns % 2, batch,
                     into(by_outputs));
  for (int64_t t = 0; t < batch; ++t)
    for (int64_t row = 0; row < rows; ++row) {
      const auto left = in_halves(w.words.data() + row * columns, columns, blocks);
      const auto right = in_halves(x.words.data() + t * columns, columns, blocks);
      const float outputs =
          modelled_outputs(w.words.data() + row * columns, x.words.data() + t * columns, columns);
      const char* differing = !same(by_pairs[t * rows + row], modelled_pairs(left, right, blocks)) ? "pairs"
                              : !same(by_outputs[t * rows + row], outputs)                         ? "outputs"
                              : !same(by_tiles[t * rows + row], modelled_tiles(left, right, blocks))
                                  ? "tiles"
                                  : nullptr;
      if (!differing) continue;
      std::printf("differ: %s, %dx%d, %d code bits, batch %d\n", differing, static_cast<int>(rows),
                  static_cast<int>(columns), code_bits, static_cast<int>(batch));
      return 1;
    }
  return 1;
}
#endif

}  // namespace

int main() {
  int cases = 0;
#ifdef GAUGEKIT_X86
  std::mt19937 random(0);
  if (isa() >= Isa::bf16)
    for (const int code_bits : {3, 4})
      for (const int64_t batch : {1, 4, 5, 16, 17, 40})
        for (const auto& [rows, columns] :
             {std::pair<int64_t, int64_t>{1, 1}, {33, 71}, {40, 1024}, {9, 4200}})
          for (const int odd_ones : {20, 1 << 20})  // many sums of infinities, and none
            cases += compare(rows, columns, code_bits, batch, odd_ones, random);
#endif
  std::printf("levels %d, cases %d\n", static_cast<int>(isa()) + 1, cases);
}
