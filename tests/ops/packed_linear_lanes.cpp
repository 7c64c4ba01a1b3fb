// Runs the GPU product's lanes (csrc/common/packed_lane.h) one after the other on the processor and prints
// each case in which a weight is not the one that was packed, or a sum is wrong. Compiled and run by
// test_packed_linear_twin.py.
#include <cmath>
#include <cstdio>

#include "common/simd.h"
#include "packed_linear_matrix.h"

namespace {

using namespace gaugekit::packed;

template <bool HALF, int C>
int compare(int64_t rows, int64_t columns, std::mt19937& random) {
  const Matrix m(rows, columns, HALF, C, random);
  const Lanes w = m.lanes();
  const int64_t width = w.blocks * 64;
  std::vector<float> x(2 * width + 4, 0.0f);  // two rows, at a multiple of 16 bytes
  float* rows_of_x = x.data() + (-(reinterpret_cast<uintptr_t>(x.data()) / 4) & 3);
  for (int64_t k = 0; k < columns; ++k) rows_of_x[k] = 1.0f, rows_of_x[width + k] = -2.0f;
  int wrong = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t segment = 0; segment < w.segments; ++segment) {
      int64_t begin = begin_of(w, row, segment);
      for (int lane = 0; lane < kLanes; ++lane) {
        const Lane<HALF, C> own = load_lane<HALF, C>(w, row, segment, lane);
        const int64_t first = segment * kSegment + lane * kLaneWeights;
        double expected = 0;
        bool finite = true;
        for (int i = 0; i < kLaneWeights && first + i < columns; ++i) {
          const uint16_t word = word_of(w, own, w.window[row], begin, i);
          const float weight = HALF ? widen(Float16Bits{word}) : widen(BFloat16Bits{word});
          wrong += word != m.words[row * columns + first + i];
          expected += weight, finite = finite && std::abs(weight) < 1e3f;
        }
        float sum[3] = {};
        if (first < width)
          multiply_lane<HALF, C, float, 3>(w, own, w.window[row], begin, rows_of_x + first, width, 2, sum);
        if (finite) wrong += std::abs(sum[0] - expected) > 1e-2 || std::abs(sum[1] + 2 * expected) > 2e-2;
        wrong += sum[2] != 0;
        begin += count_bits(own.escaped);
      }
    }
  if (wrong) std::printf("wrong: half %d, %d code bits, %dx%d\n", HALF, C, int(rows), int(columns));
  return 1;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  int cases = 0, widened = 0;
  for (const auto [rows, columns] : {std::pair<int, int>{1, 1}, {9, 70}, {19, 1024}, {10, 2100}}) {
    cases += compare<false, 3>(rows, columns, random) + compare<false, 4>(rows, columns, random);
    cases += compare<true, 3>(rows, columns, random) + compare<true, 4>(rows, columns, random);
  }
  using Half = gaugekit::Vector<uint16_t, 1>;
  for (uint32_t bits = 0; bits < 65536; ++bits) {  // every half, against the conversion of the other kernels
    const float a = widen(Float16Bits{static_cast<uint16_t>(bits)});
    const float b = gaugekit::widen<1>(Half{static_cast<uint16_t>(bits)}, gaugekit::Float16{})[0];
    widened += gaugekit::packed::bits_of(a) == gaugekit::packed::bits_of(b);
  }
  std::printf("halves %d, cases %d\n", widened, cases);
}
