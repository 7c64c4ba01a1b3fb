// What the decoding and the products of packed weights share (docs/resident.md): the layout's numbers, a
// packed matrix, and the part of a row that is decoded at a time. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/isa.h"

namespace gaugekit::packed {

constexpr int64_t BLOCK = 64, SEGMENT_BLOCKS = 16, SEGMENT = BLOCK * SEGMENT_BLOCKS;
// Escapes are patched four at a time without a branch, so a stream is read, and bytes are written, a little
// further.
constexpr int64_t SLACK = 64;

// The low bytes of an E5M2 matrix, which stores none: an E5M2 number is the high byte of a float16 one whose
// low byte is zero.
alignas(64) inline constexpr uint8_t NO_LOW_BYTES[SEGMENT] = {};

struct Weight {
  const uint8_t* raw;  // null: E5M2
  const uint64_t* planes;
  const uint8_t* escapes;
  const int32_t* offsets;
  const uint8_t* window;
  int64_t rows, blocks, escape_count, plane_count;
  const uint16_t* plain =
      nullptr;  // the words themselves, [rows, blocks * BLOCK], for the product's PLAIN twin

  bool half() const { return plane_count > 4; }  // whether its words are float16's; E5M2's are
  bool e5m2() const { return raw == nullptr; }
  int code_bits() const { return static_cast<int>(half() ? plane_count - 3 : plane_count); }
  int64_t segments() const { return (blocks + SEGMENT_BLOCKS - 1) / SEGMENT_BLOCKS; }
  int64_t blocks_of(int64_t segment) const {
    return std::min(SEGMENT_BLOCKS, blocks - segment * SEGMENT_BLOCKS);
  }
  const uint8_t* raw_at(int64_t row, int64_t segment) const {
    return e5m2() ? NO_LOW_BYTES : raw + row * blocks * BLOCK + segment * SEGMENT;
  }
  const uint64_t* planes_at(int64_t row, int64_t segment) const {
    return planes + row * plane_count * blocks + segment * SEGMENT_BLOCKS;
  }
};

// One row's part of a segment, ready to decode.
struct Segment {
  const uint8_t* raw;
  const uint64_t* planes;  // plane p at planes + p * stride
  int64_t stride;
  const uint8_t* escapes;
  int64_t blocks;
  uint8_t window;
};

// `tail` (SEGMENT + SLACK bytes) holds the escapes where the stream ends too soon to be read freely.
inline Segment segment_of(const Weight& w, int64_t row, int64_t s, uint8_t* tail) {
  const int64_t offset = std::clamp<int64_t>(w.offsets[row * w.segments() + s], 0, w.escape_count);
  const uint8_t* escapes = w.escapes + offset;
  const int64_t left = w.escape_count - offset;
  if (left < SEGMENT + SLACK) {
    std::memset(tail, 0, SEGMENT + SLACK);
    if (left > 0) std::memcpy(tail, escapes, std::min(left, SEGMENT));
    escapes = tail;
  }
  return {w.raw_at(row, s), w.planes_at(row, s), w.blocks, escapes, w.blocks_of(s), w.window[row]};
}

// What plane p adds to the byte.
template <bool HALF, int C>
constexpr uint8_t plane_value(int p) {
  if (!HALF) return static_cast<uint8_t>(1 << p);
  return p < C ? static_cast<uint8_t>(4 << p) : p == C ? 1 : p == C + 1 ? 2 : 0x80;
}
template <bool HALF, int C>
constexpr int planes_of = HALF ? C + 3 : C;

template <int C>
GAUGEKIT_INLINE uint64_t escaped(const Segment& s, int64_t block) {
  uint64_t mask = ~uint64_t(0);
  for (int p = 0; p < C; ++p) mask &= s.planes[p * s.stride + block];
  return mask;
}

// The word of a weight's raw byte and the byte that its planes hold.
GAUGEKIT_INLINE uint16_t word_of(bool half, uint8_t raw, uint8_t byte) {
  if (half) return static_cast<uint16_t>(byte << 8 | raw);
  return static_cast<uint16_t>((raw & 0x80) << 8 | byte << 7 | (raw & 0x7f));
}

// Bytes of a block that `raw` points to.
template <bool PLAIN>
constexpr int64_t STRIDE = PLAIN ? 2 * BLOCK : BLOCK;

// One segment of a row of W times a row of x; `sums` are [64].
struct Tile {
  const uint8_t* raw;
  const uint8_t* bytes;
  const uint8_t* next;  // what will be read after this segment
  const float* x;
  float* sums;
  int64_t blocks;
};

}  // namespace gaugekit::packed
