// Random matrices, packed as the tests of lanes need them: one weight in `odd_ones` is any bit pattern.
#pragma once

#include <random>
#include <vector>

#include "common/packed_lane.h"
#include "cpu/packed_linear_encode.h"

namespace gaugekit::packed {

struct Matrix {
  int64_t rows, columns;
  std::vector<uint16_t> words;
  std::vector<uint8_t> raw, window, escapes;
  std::vector<uint64_t> planes;
  std::vector<int32_t> offsets;

  Lanes lanes() const {
    return Lanes{raw.data(),
                 reinterpret_cast<const uint32_t*>(planes.data()),
                 escapes.data(),
                 offsets.data(),
                 window.data(),
                 rows,
                 (columns + 63) / 64,
                 (columns + kSegment - 1) / kSegment,
                 static_cast<int64_t>(escapes.size())};
  }
};

inline Matrix pack(int64_t rows, int64_t columns, bool half, int code_bits, std::mt19937& random,
                   int odd_ones = 20) {
  std::normal_distribution<float> normal(0, 0.02f);
  std::uniform_int_distribution<int> any(0, 65535);
  Matrix m{rows, columns};
  const int64_t blocks = (columns + 63) / 64, segments = (columns + kSegment - 1) / kSegment;
  for (int64_t i = 0; i < rows * columns; ++i) {
    uint32_t word = bits_of(normal(random)) >> 16;
    if (half) word = 0x2000 | any(random) % 0x800 | (any(random) & 0x8000);
    m.words.push_back(static_cast<uint16_t>(any(random) % odd_ones ? word : any(random)));
  }
  const Words from{m.words.data(), rows, columns, half};
  const int64_t count = code_bits + (half ? 3 : 0);
  m.raw.resize(rows * blocks * 64 + 16), m.planes.resize(rows * count * blocks), m.window.resize(rows);
  m.offsets.resize(rows * segments + 1);
  std::vector<int64_t> begins(rows + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const Survey found = survey_row(from, row);
    m.window[row] = static_cast<uint8_t>(found.window[code_bits - 3]);
    begins[row + 1] = begins[row] + found.escapes[code_bits - 3];
  }
  m.escapes.resize(begins[rows]);
  for (int64_t row = 0; row < rows; ++row)
    encode_row(m.words.data() + row * columns, columns, half, code_bits,
               Target{m.raw.data() + row * blocks * 64, m.planes.data() + row * count * blocks, blocks,
                      m.escapes.data() + begins[row], m.escapes.data() + begins[row + 1], m.window[row]},
               begins[row], m.offsets.data() + row * segments, Isa::portable);
  m.offsets.back() = static_cast<int32_t>(begins[rows]);
  return m;
}

}  // namespace gaugekit::packed
