// Decoding for a machine of many lanes, each of which runs this code for itself: what one lane does, and what
// a chunk tells it. A warp takes a segment; csrc/cuda runs it so, and csrc/cpu runs it lane by lane, to test
// it.
#pragma once

#include "common/rans_table.h"

namespace gaugekit::rans {

// One chunk to decode: a row of what python/gaugekit/ops/rans/rows.py makes from blobs that were checked.
struct ChunkRow {
  uint64_t in;           // where the chunk begins in the packed bytes, a multiple of 16
  uint64_t out;          // where element `from` goes, in bytes
  uint32_t n, from, to;  // its elements, and those that are wanted
  uint32_t length;       // its bytes
  uint32_t words[kSegments];
  uint16_t symbols;
  uint8_t method, constant;  // as in the index
  uint8_t width, model;      // bytes of an element; of the chunk's own symbols
  uint16_t reserved;
};
static_assert(sizeof(ChunkRow) == 48, "the row is its bytes");

// A coded chunk's parts.
struct Sections {
  const uint8_t *states, *table, *words[kSegments], *planes[3];
};

// Places the sections of a row's chunk, which begins at `chunk`. False if row and sizes contradict each
// other; nothing is read then.
GAUGEKIT_HD inline bool place_sections(const ChunkRow& row, const uint8_t* chunk, uint64_t packed_bytes,
                                       uint64_t out_bytes, Sections& s) {
  const bool known = (row.width == 1 || row.width == 2 || row.width == 4) && row.model <= kExponentAndTwo &&
                     (row.model != kExponentAndTwo || row.width == 2) && row.symbols <= kMaxSymbols;
  if (!known || row.in % 16 || row.in > packed_bytes || row.length > packed_bytes - row.in) return false;
  if (row.from > row.to || row.to > row.n || row.out % row.width || row.out > out_bytes) return false;
  if (uint64_t(row.to - row.from) * row.width > out_bytes - row.out) return false;
  if (row.method == kRaw) return padded(uint64_t(row.n) * row.width) == row.length;
  uint64_t at = 4 * kLanes;
  s.states = chunk;
  s.table = chunk + at;
  at += padded(4 * uint64_t(row.symbols));
  for (int i = 0; i < kSegments; ++i) {
    s.words[i] = chunk + at;
    at += padded(2 * uint64_t(row.words[i]));
  }
  const uint64_t bytes =
      row.model == kExponentAndTwo ? (uint64_t(row.n) + kLanes - 1) / kLanes * kSixBytes : row.n;
  for (int plane = row.width - 2; plane >= 0; --plane) {
    s.planes[plane] = chunk + at;
    at += padded(row.constant >> plane & 1 ? 1 : bytes);
  }
  return row.symbols != 0 && at == row.length;
}

// A chunk's buckets, one word a bucket in each array: with 32 of them, every lane of a warp reads its own
// bank.
struct LaneTable {
  uint32_t bucket[kMaxSymbols];  // divider << 16 | second symbol << 8 | first symbol
  uint32_t part[2]
               [kMaxSymbols];  // (rank - place in the bucket) << 16 | frequency, of the first and the second
  int width_log2, shift;
};

GAUGEKIT_HD inline void fill_lanes(const Table& table, Buckets& b, LaneTable& out) {
  int16_t* rank = b.rest;
  for (int i = 0; i < b.count; ++i) rank[i] = 0;
  out.shift = table.shift;
  out.width_log2 = 0;
  while (1 << out.width_log2 < b.width) ++out.width_log2;
  for (int i = 0; i < b.count; ++i) {
    // A bucket whose first part is empty is all its alias; one whose second part is empty never looks there.
    const int divider = b.divider[i] ? b.divider[i] : b.width, first = b.divider[i] ? i : b.alias[i];
    const int second = divider < b.width ? b.alias[i] : first;
    out.bucket[i] = uint32_t(divider) << 16 | uint32_t(table.symbol[second]) << 8 | table.symbol[first];
    out.part[0][i] = uint32_t(rank[first]) << 16 | table.frequency[first];
    rank[first] = int16_t(rank[first] + divider);
    out.part[1][i] = uint32_t(rank[second] - divider) << 16 | table.frequency[second];
    rank[second] = int16_t(rank[second] + b.width - divider);
  }
}

// One step of one lane: its symbol, and its state before a word is taken.
GAUGEKIT_HD inline uint32_t lane_step(uint32_t x, const LaneTable& t, uint32_t& symbol) {
  const uint32_t slot = x & (kSlots - 1), place = slot & ((1u << t.width_log2) - 1);
  const uint32_t i = slot >> t.width_log2, bucket = t.bucket[i];
  const bool second = place >= bucket >> 16;
  symbol = (second ? bucket >> 8 : bucket) & 0xFF;
  const uint32_t part = t.part[second][i];
  return (part & 0xFFFF) * (x >> kProbabilityBits) + place + uint32_t(int32_t(part) >> 16);
}

// The next word of a segment, zero beyond its end: a damaged stream must not read what is not its own.
GAUGEKIT_HD inline uint32_t word_at(const Sections& s, int segment, uint32_t at, uint32_t words) {
  return at < words ? reinterpret_cast<const uint16_t*>(s.words[segment])[at] : 0;
}

// Element e of the chunk from its symbol and planes.
template <int width, int model>
GAUGEKIT_HD uint32_t lane_element_bits(const ChunkRow& row, const Sections& s, uint32_t e, uint32_t symbol,
                                       int shift) {
  if constexpr (model == kExponentAndTwo) {
    uint32_t six = s.planes[0][0];
    if (!row.constant) {
      const uint8_t* group = s.planes[0] + e / kLanes * kSixBytes;
      const uint32_t k = e % kLanes, third = k % 16;
      six = k < kSixBytes ? group[k] & 63
                          : group[third] >> 6 | (group[16 + third] >> 6) << 2 | (group[32 + third] >> 6) << 4;
    }
    const uint32_t ten = symbol < uint32_t(kZeroSymbols) ? symbol : symbol + uint32_t(shift);
    return ten << 5 | (six & 32) << 10 | (six & 31);
  } else {
    uint32_t y = symbol << (8 * width - 8);
    for (int plane = 0; plane < width - 1; ++plane)
      y |= uint32_t(s.planes[plane][row.constant >> plane & 1 ? 0 : e]) << (8 * plane);
    if constexpr (model == kHighByte) return y;
    constexpr uint32_t sign = 1u << (8 * width - 1), mantissa = (sign >> 8) - 1;
    return (y << 8 & sign) | (y >> 1 & (sign - 1 - mantissa)) | (y & mantissa);
  }
}

// Calls run.kind<width, model>() for a row's elements and symbols.
template <class Run>
GAUGEKIT_DEVICE auto with_lane_kind(const ChunkRow& row, Run& run) {
  if (row.width == 1) return run.template kind<1, kHighByte>();
  if (row.width == 4)
    return row.model == kExponent ? run.template kind<4, kExponent>() : run.template kind<4, kHighByte>();
  if (row.model == kExponentAndTwo) return run.template kind<2, kExponentAndTwo>();
  return row.model == kExponent ? run.template kind<2, kExponent>() : run.template kind<2, kHighByte>();
}

template <int width>
GAUGEKIT_HD inline void store_element(uint8_t* out, uint64_t i, uint32_t bits) {
  if constexpr (width == 1) out[i] = uint8_t(bits);
  if constexpr (width == 2) reinterpret_cast<uint16_t*>(out)[i] = uint16_t(bits);
  if constexpr (width == 4) reinterpret_cast<uint32_t*>(out)[i] = bits;
}

}  // namespace gaugekit::rans
