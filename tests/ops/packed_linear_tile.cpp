// Runs the lanes of the GPU product on tensor cores (csrc/common/packed_tile.h) one after the other on the
// processor: each pair of weights and of x where the product expects it, each escape listed once, and what it
// lacks. Prints the cases in which a bit differs. Compiled and run by test_packed_linear_twin.py.
#include <cstdio>

#include "common/packed_tile.h"
#include "packed_linear_matrix.h"

namespace {

using namespace gaugekit::packed;

template <bool HALF>
float weight_of(uint16_t word) {
  return HALF ? widen(Float16Bits{word}) : widen(BFloat16Bits{word});
}

// The word that decode_pairs should give: the weight's own, or with the escape's exponent.
template <bool HALF, int C>
uint16_t known_word(const Matrix& m, int64_t row, int64_t column, bool escaped) {
  const uint16_t word = column < m.columns ? m.words[row * m.columns + column] : 0;
  if (!escaped) return word;
  const int first = HALF ? 10 : 7, largest = HALF ? 31 : 255;
  return static_cast<uint16_t>((word & ~(largest << first)) | escape_exponent<HALF, C>(m.window[row])
                                                                  << first);
}

// A lane's 32 weights of one row, all of its pairs; x holds the numbers of the columns.
template <bool HALF, int C>
int compare_pairs(const Matrix& m, const Lane<HALF, C>& own, int64_t row, int64_t first) {
  const auto table = make_exponents<HALF, C>(m.window[row]);
  const auto selectors = make_selectors(own);
  uint32_t columns[kLaneWeights / 2];
  for (int i = 0; i < kLaneWeights / 2; ++i) columns[i] = (2 * i + 1) << 16 | 2 * i;
  int wrong = 0;
  uint32_t seen = 0;
  for (int s = 0; s < 4; ++s)
    for (int half = 0; half < 2; ++half) {
      uint32_t pair[2];
      decode_pairs(own, selectors, table, s, half, pair);
      for (int m_pair = 0; m_pair < 2; ++m_pair)
        for (int i = 0; i < 2; ++i) {
          const uint32_t at = pair_of(columns, s, half, m_pair) >> 16 * i & 0xffff;
          const uint16_t word = pair[m_pair] >> 16 * i & 0xffff;
          const bool padded = first + at >= m.columns;
          seen |= 1u << at;
          if (!padded)
            wrong += word != known_word<HALF, C>(m, row, first + at, own.escaped >> at & 1);
          else
            wrong += !(std::abs(weight_of<HALF>(word)) < INFINITY);
        }
    }
  return wrong + (seen != ~0u);
}

// The masks of one row as the kernel keeps them; its escapes as 16 threads list them, a pass at a time.
template <bool HALF, int C>
int compare_escapes(const Matrix& m, const Lanes& w, int64_t row, const std::vector<uint32_t>& masks) {
  const int words = static_cast<int>(masks.size()), each = (words + kTileThreads - 1) / kTileThreads;
  int total = 0, wrong = 0;
  for (uint32_t mask : masks) total += count_bits(mask);
  std::vector<int> base(w.segments), seen(m.columns, 0);
  for (int done = 0; done < total; done += kListed) {
    std::vector<uint16_t> list(kListed, 0xffff);
    for (int thread = 0, rank = 0; thread < kTileThreads; ++thread) {
      const int first = std::min(thread * each, words), stop = std::min(first + each, words);
      list_escapes(w, row, masks.data(), first, stop, rank, done, list.data(), base.data());
      for (int word = first; word < stop; ++word) rank += count_bits(masks[word]);
    }
    for (int e = 0; e < std::min(total - done, kListed); ++e) {
      const int column = list[e];
      if (column >= m.columns) return wrong + 1;
      ++seen[column];
      const float value = weight_of<HALF>(m.words[row * m.columns + column]);
      const float known = weight_of<HALF>(known_word<HALF, C>(m, row, column, true));
      const float difference = escape_difference<HALF, C>(w, row, column, base[column / kSegment] + done + e);
      wrong += std::isnan(value) ? !std::isnan(difference) : difference != value - known;
    }
  }
  for (int64_t k = 0; k < m.columns; ++k)
    wrong += seen[k] != static_cast<int>(masks[k / kLaneWeights] >> k % kLaneWeights & 1);
  return wrong;
}

template <bool HALF, int C>
int compare(int64_t rows, int64_t columns, std::mt19937& random) {
  const Matrix m(rows, columns, HALF, C, random);
  const Lanes w = m.lanes();
  int wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<uint32_t> masks(2 * w.blocks);
    for (int64_t at = 0; at < 2 * w.blocks; ++at) {
      const Lane<HALF, C> own = load_lane<HALF, C>(w, row, at / kLanes, static_cast<int>(at % kLanes));
      masks[at] = own.escaped;
      wrong += compare_pairs(m, own, row, at * kLaneWeights);
    }
    wrong += compare_escapes<HALF, C>(m, w, row, masks);
  }
  if (wrong)
    std::printf("wrong: %d, half %d, %d code bits, %dx%d\n", wrong, HALF, C, int(rows), int(columns));
  return 1;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  int cases = 0, escapes = 0;
  for (const auto [rows, columns] : {std::pair<int, int>{1, 1}, {9, 70}, {19, 1024}, {3, 9000}}) {
    cases += compare<false, 3>(rows, columns, random) + compare<false, 4>(rows, columns, random);
    cases += compare<true, 3>(rows, columns, random) + compare<true, 4>(rows, columns, random);
  }
  const Matrix m(1, 9000, false, 3, random);
  escapes = static_cast<int>(m.escapes.size()) / kListed;
  std::printf("passes %d, cases %d\n", escapes, cases);
}
