// What one lane of a warp does in the product of 16 rows of packed weights (docs/resident.md) on tensor
// cores. Four lanes share a row: a lane holds 32 neighbouring weights of it, one 32-bit word of each plane,
// and turns them into 16 pairs. The order of the pairs is the one that costs least to decode; x is arranged
// the same way. An escaped weight is decoded as if its exponent were the least, and what that lacks is added
// afterwards. Free of CUDA's and torch's headers, so that a test runs the same code on the processor, lane by
// lane.
#pragma once

#include "common/packed_lane.h"
#include "common/select_bits.h"

namespace gaugekit::packed {

constexpr int kTileRows = 16, kTileThreads = 16;  // rows of a tile; threads that correct one of them
constexpr int kListed = 256;                      // escapes of a row that are corrected at a time

// Byte i of the result is byte `selector >> 4 i & 7` of b:a, or that byte's sign eight times where bit 3 is
// set.
GAUGEKIT_HD GAUGEKIT_INLINE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
#else
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = both >> 8 * (selector >> 4 * i & 7) & 0xffu;
    bytes |= (selector >> 4 * i & 8 ? (byte & 0x80u ? 0xffu : 0u) : byte) << 8 * i;
  }
  return bytes;
#endif
}

GAUGEKIT_HD GAUGEKIT_INLINE int lowest_bit(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __ffs(int(x)) - 1;
#else
  return __builtin_ctz(x);
#endif
}

// Nibble j of selector[s] is the code of weight 4 j + s, from its BITS planes.
template <int BITS>
GAUGEKIT_HD GAUGEKIT_INLINE void make_selectors(const uint32_t* plane, uint32_t selector[4]) {
  constexpr uint32_t one = 0x55555555u, two = 0x33333333u;
  const uint32_t even = select_bits(plane[0], plane[1] << 1, one),
                 odd = select_bits(plane[0] >> 1, plane[1], one);
  uint32_t high_even = plane[2] & one, high_odd = plane[2] >> 1 & one;
  if constexpr (BITS == 4) {
    high_even = select_bits(plane[2], plane[3] << 1, one);
    high_odd = select_bits(plane[2] >> 1, plane[3], one);
  }
  selector[0] = select_bits(even, high_even << 2, two);
  selector[1] = select_bits(odd, high_odd << 2, two);
  selector[2] = select_bits(even >> 2, high_even, two);
  selector[3] = select_bits(odd >> 2, high_odd, two);
}

// What a row's codes stand for, a byte a code: the exponent's bits in a weight's high byte, and for bfloat16
// its lowest bit, in the low byte. That bit is the code's parity, so codes from 8 on have that of 0 to 7. The
// escape's exponent is 0, or its parity.
template <bool HALF, int C>
struct Exponents {
  uint32_t high[C == 4 ? 4 : 2], low[2];
};

template <bool HALF, int C>
GAUGEKIT_HD GAUGEKIT_INLINE uint32_t escape_exponent(uint32_t window) {
  return !HALF && C == 4 ? (window + 7) & 1u : 0u;
}

template <bool HALF, int C>
GAUGEKIT_HD GAUGEKIT_INLINE Exponents<HALF, C> make_exponents(uint32_t window) {
  Exponents<HALF, C> table{};
#pragma unroll
  for (int code = 0; code < (1 << C) - 1; ++code) {
    const uint32_t exponent = window + code;
    table.high[code / 4] |= (HALF ? exponent << 2 & 0x7cu : exponent >> 1 & 0x7fu) << 8 * (code % 4);
    if (!HALF && code < 8) table.low[code / 4] |= (exponent & 1u) << 7 << 8 * (code % 4);
  }
  return table;
}

// The first column of pair m = 0, 1 of quarter s = 0 .. 3, half = 0, 1; its second is four further.
GAUGEKIT_HD GAUGEKIT_INLINE constexpr int pair_column(int s, int half, int m) {
  return s + 16 * half + 8 * m;
}

// The selectors of a lane's codes, and for float16 of its three further planes.
template <bool HALF, int C>
struct Selectors {
  uint32_t code[4], rest[HALF ? 4 : 1];
};

template <bool HALF, int C>
GAUGEKIT_HD GAUGEKIT_INLINE Selectors<HALF, C> make_selectors(const Lane<HALF, C>& own) {
  Selectors<HALF, C> made{};
  make_selectors<C>(own.plane, made.code);
  if constexpr (HALF) make_selectors<3>(own.plane + C, made.rest);
  return made;
}

// Two pairs of 16-bit weights: columns pair_column(s, half, m), m = 0 and 1, each with the one four further.
template <bool HALF, int C>
GAUGEKIT_HD GAUGEKIT_INLINE void decode_pairs(const Lane<HALF, C>& own, const Selectors<HALF, C>& selectors,
                                              const Exponents<HALF, C>& table, int s, int half,
                                              uint32_t pair[2]) {
  const uint32_t codes = selectors.code[s] >> 16 * half;
  uint32_t high = permute(table.high[0], table.high[1], codes);
  // Bit 3 of a code chooses the sign of a byte, which is 0 here: the other eight exponents come by the
  // complement.
  if constexpr (C == 4) high |= permute(table.high[2], table.high[3], codes ^ 0x8888u);
  uint32_t low = high;
  if constexpr (HALF)
    high |= permute(0x03020100u, 0x83828180u, selectors.rest[s] >> 16 * half);
  else
    low = permute(table.low[0], table.low[1], codes);
  constexpr uint32_t mask = HALF ? 0x00ff00ffu : 0x807f807fu;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int j = 4 * half + 2 * m;
    const uint32_t raw = permute(own.raw[j], own.raw[j + 1], 0x4400u + 0x1111u * s);
    const uint32_t rest =
        HALF ? permute(high, high, m ? 0x3322u : 0x1100u) : permute(low, high, m ? 0x7362u : 0x5140u);
    pair[m] = select_bits(raw, rest, mask);
  }
}

// The numbers of x for a pair of weights, from a lane's 32 columns as words of two.
GAUGEKIT_HD GAUGEKIT_INLINE uint32_t pair_of(const uint32_t x[kLaneWeights / 2], int s, int half, int m) {
  const int column = pair_column(s, half, m);
  return permute(x[column / 2], x[column / 2 + 2], s % 2 ? 0x7632u : 0x5410u);
}

// Escapes of a row's words [first, stop) of its masks, `rank` of which came before. Those from `done` on go
// to the list, as many as it holds; segment_base + rank is where an escape stands in the stream.
GAUGEKIT_HD GAUGEKIT_INLINE void list_escapes(const Lanes& w, int64_t row, const uint32_t* masks, int first,
                                              int stop, int rank, int done, uint16_t* list,
                                              int* segment_base) {
  for (int word = first; word < stop; ++word) {
    if (word % kLanes == 0)
      segment_base[word / kLanes] = static_cast<int>(begin_of(w, row, word / kLanes)) - rank;
    for (uint32_t mask = masks[word]; mask; mask &= mask - 1, ++rank)
      if (rank >= done && rank - done < kListed)
        list[rank - done] = static_cast<uint16_t>(word * kLaneWeights + lowest_bit(mask));
  }
}

// What the escaped weight at a column lacks of its value after decode_pairs. A byte past the stream's end is
// 0.
template <bool HALF, int C>
GAUGEKIT_HD GAUGEKIT_INLINE float escape_difference(const Lanes& w, int64_t row, int column, int place) {
  const uint32_t window = w.window[row];
  uint32_t exponent = window + (1u << C) - 1u;
  if (0 <= place && place < w.escape_count) exponent ^= w.escapes[place];
  const uint32_t raw = w.raw[row * w.blocks * 64 + column];
  if constexpr (!HALF) {
    const uint32_t rest = (raw & 0x80u) << 8 | (raw & 0x7fu);
    const uint32_t known = rest | escape_exponent<HALF, C>(window) << 7;
    return widen(BFloat16Bits{static_cast<uint16_t>(rest | exponent << 7)}) -
           widen(BFloat16Bits{static_cast<uint16_t>(known)});
  } else {
    const uint32_t* plane = w.planes + (row * (C + 3) + C) * 2 * w.blocks + column / kLaneWeights;
    uint32_t rest = raw;
    for (int p = 0; p < 3; ++p)
      rest |= (plane[p * 2 * w.blocks] >> column % kLaneWeights & 1u) << (p == 2 ? 15 : 8 + p);
    return widen(Float16Bits{static_cast<uint16_t>(rest | exponent << 10)}) -
           widen(Float16Bits{static_cast<uint16_t>(rest)});
  }
}

}  // namespace gaugekit::packed
