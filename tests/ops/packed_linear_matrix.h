// Random matrices beside their packed form, as the programs here need them. Other words than the common ones
// come in `odd_ones` weights: one of so many is any bit pattern.
#pragma once

#include <random>
#include <vector>

#include "common/packed_lane.h"
#include "common/simd.h"
#include "cpu/packed_linear_encode.h"

namespace gaugekit::packed {

// A word of a number that is about normal, of deviation 0.018, by nothing that C libraries round in ways of
// their own.
inline uint16_t word_near_zero(std::mt19937& random, bool half) {
  int sum = -2 * 65535;
  for (int i = 0; i < 4; ++i) sum += static_cast<int>(random() >> 16);
  const Vector<float, 1> value{static_cast<float>(sum) * 0x1p-21f};
  return half ? gaugekit::narrow<1>(value, Float16{})[0] : gaugekit::narrow<1>(value, BFloat16{})[0];
}

enum class Kind { bfloat16, float16, e5m2 };  // e5m2: as float16 words

struct Matrix {
  int64_t rows, columns;
  Kind kind;
  bool half;
  int code_bits;
  std::vector<uint16_t> words, plain;  // plain: rows of whole blocks
  std::vector<uint8_t> raw, window, escapes;
  std::vector<uint64_t> planes;
  std::vector<int32_t> offsets;

  Matrix(int64_t rows, int64_t columns, bool half, int code_bits, std::mt19937& random, int odd_ones = 20)
      : Matrix(rows, columns, half ? Kind::float16 : Kind::bfloat16, code_bits, random, odd_ones) {}

  Matrix(int64_t rows, int64_t columns, Kind kind, int code_bits, std::mt19937& random, int odd_ones = 20)
      : rows(rows),
        columns(columns),
        kind(kind),
        half(kind != Kind::bfloat16),
        code_bits(code_bits),
        words(rows * columns),
        window(rows) {
    const int64_t segments = (blocks() + SEGMENT_BLOCKS - 1) / SEGMENT_BLOCKS;
    for (auto& word : words) word = random() % odd_ones ? word_near_zero(random, half) : random() & 0xffff;
    if (kind == Kind::e5m2)
      for (auto& word : words) word &= 0xff00;
    plain.resize(rows * blocks() * BLOCK);
    raw.resize(rows * blocks() * BLOCK + 16);  // lanes read a little further
    planes.resize(rows * plane_count() * blocks()), offsets.resize(rows * segments + 1);
    const Words from{words.data(), rows, columns, half};
    std::vector<int64_t> begins(rows + 1);
    for (int64_t row = 0; row < rows; ++row) {
      const Survey found = survey_row(from, row);
      window[row] = static_cast<uint8_t>(found.window[code_bits - 3]);
      begins[row + 1] = begins[row] + found.escapes[code_bits - 3];
      std::copy_n(words.data() + row * columns, columns, plain.data() + row * blocks() * BLOCK);
    }
    escapes.resize(begins[rows]);
    for (int64_t row = 0; row < rows; ++row)
      encode_row(
          words.data() + row * columns, columns, half, code_bits,
          Target{raw.data() + row * blocks() * BLOCK, planes.data() + row * plane_count() * blocks(),
                 blocks(), escapes.data() + begins[row], escapes.data() + begins[row + 1], window[row]},
          begins[row], offsets.data() + row * segments, Isa::portable);
    offsets.back() = static_cast<int32_t>(begins[rows]);
  }

  int64_t blocks() const { return (columns + BLOCK - 1) / BLOCK; }
  int64_t plane_count() const { return code_bits + (half ? 3 : 0); }
  int64_t escape_count() const { return static_cast<int64_t>(escapes.size()); }

  // As the processor's products take it, and as the lanes of the GPU's.
  Weight weight() const {
    const uint8_t* low = kind == Kind::e5m2 ? nullptr : raw.data();
    return Weight{low,  planes.data(), escapes.data(), offsets.data(), window.data(),
                  rows, blocks(),      escape_count(), plane_count(),  plain.data()};
  }
  Lanes lanes() const {
    return Lanes{raw.data(),     reinterpret_cast<const uint32_t*>(planes.data()),
                 escapes.data(), offsets.data(),
                 window.data(),  rows,
                 blocks(),       (columns + kSegment - 1) / kSegment,
                 escape_count()};
  }
};

}  // namespace gaugekit::packed
