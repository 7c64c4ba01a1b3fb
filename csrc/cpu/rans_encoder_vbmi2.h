// The coder with what a step asks of tables looked up for 32 lanes at once, in 16 bits, and a segment's words
// gathered by one instruction (AVX512-VBMI2). Only the quotient takes 32 bits a lane. For at most 32 symbols.
#pragma once

#include "common/isa.h"
#include "rans_decoder_vbmi2.h"
#include "rans_encoder_avx512.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::vbmi2 {

using avx512::kAll16;
using avx512::kTruncate;

// Of a group's 64 elements, those of each segment's lanes, twice: as bytes of 16-bit lanes.
struct LaneOrder {
  alignas(64) uint8_t words[2][64];
};

constexpr LaneOrder make_lane_order() {
  LaneOrder order{};
  for (int segment = 0; segment < 2; ++segment)
    for (int lane = 0; lane < kSegmentLanes; ++lane)
      for (int byte = 0; byte < 2; ++byte)
        order.words[segment][2 * lane + byte] = uint8_t(kSegmentLanes * segment + lane_element(lane));
  return order;
}

inline constexpr LaneOrder kLaneOrder = make_lane_order();

// EncoderCells in 16-bit lanes, and reciprocals; and by symbol the index in those of symbols.
template <int breaks>
struct Codes {
  __m512i frequency, start, number[breaks + 1], last[breaks];
  __m512 reciprocal[2];
  __m512i index[4];
  bool direct;  // the low five bits of the symbols, where no two have the same, are the index: lookups see no
                // others
};

GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i half_table(const uint32_t* table, int shift, uint32_t mask) {
  alignas(64) uint16_t half[kCells];
  for (int i = 0; i < kCells; ++i) half[i] = uint16_t(table[i] >> shift & mask);
  return _mm512_load_si512(half);
}

template <int breaks>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE Codes<breaks> load_codes(const EncoderTable& t) {
  constexpr uint32_t number = kSlots - 1, all = 0xFFFF;
  Codes<breaks> c;
  uint32_t low_bits = 0;
  for (int i = 0; i < t.table.size; ++i) low_bits |= 1u << t.table.symbol[i] % kCells;
  c.direct = __builtin_popcount(low_bits) == t.table.size;
  alignas(64) uint8_t index[256] = {};
  alignas(64) uint32_t code[kCells];
  std::fill_n(code, kCells, 1u);
  for (int i = 0; i < t.table.size; ++i) {
    const int symbol = t.table.symbol[i];
    index[symbol] = uint8_t(c.direct ? symbol % kCells : i);
    code[index[symbol]] = t.cells.code[i];
  }
  for (int k = 0; k < 4; ++k) c.index[k] = _mm512_load_si512(index + 64 * k);
  c.frequency = half_table(code, 0, all), c.start = half_table(code, 16, all);
  for (int half = 0; half < 2; ++half)
    c.reciprocal[half] = avx512::reciprocal_of(_mm512_load_si512(code + 16 * half));
  c.number[0] = half_table(t.cells.at[0], 0, number);
  for (int k = 0; k < breaks; ++k) {
    c.number[k + 1] = half_table(t.cells.at[k], k ? 0 : 12, number);
    c.last[k] = half_table(t.cells.at[k], 25, all);
  }
  return c;
}

template <int breaks>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i indices(__m512i symbols, const Codes<breaks>& c) {
  if (c.direct) return symbols;
  return _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(c.index[0], symbols, c.index[1]),
                              _mm512_movepi8_mask(symbols),
                              _mm512_permutex2var_epi8(c.index[2], symbols, c.index[3]));
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i pick(__m512i table, __m512i index) {
  return _mm512_maskz_permutexvar_epi16(kAll32, index, table);
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i pick_bytes(const uint8_t* order, __m512i bytes) {
  return _mm512_maskz_permutexvar_epi8(kAll64, _mm512_load_si512(order), bytes);
}

// 32 states x = 2^16 * high + low. A segment's step has two parts: between them there are the states that
// follow without their slots, and `place`, the rank behind its symbol's start.
struct States {
  __m512i high, low;
};

struct Step {
  States state;
  __m512i place;
  __mmask32 mapped;
};

constexpr __mmask32 kOdd = 0xAAAAAAAA;

GAUGEKIT_VBMI2 GAUGEKIT_INLINE States load_states(const uint32_t* states) {
  const __m512i a = _mm512_loadu_si512(states), b = _mm512_loadu_si512(states + 16);
  return {_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.high), b),
          _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.low), b)};
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE void store_states(const States& s, uint32_t* states) {
  _mm512_storeu_si512(states, _mm512_permutex2var_epi16(s.low, _mm512_load_si512(kOrder.first), s.high));
  _mm512_storeu_si512(states + 16,
                      _mm512_permutex2var_epi16(s.low, _mm512_load_si512(kOrder.second), s.high));
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE void put_words(__m512i words, __mmask32 spill, uint16_t*& next) {
  const int spilled = __builtin_popcount(spill);
  next -= spilled;
  words = _mm512_maskz_compress_epi16(spill, words);
  if (__builtin_expect(spilled <= 16, true))  // half as many bytes are stored in half of the time
    _mm256_mask_storeu_epi16(next, __mmask16((1u << spilled) - 1),
                             _mm512_maskz_extracti64x4_epi64(avx512::kAll8, words, 0));
  else
    _mm512_mask_storeu_epi16(next, __mmask32((uint64_t(1) << spilled) - 1), words);
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i quotient(__m512i x, __m512 reciprocal) {
  return _mm512_maskz_cvttps_epi32(
      kAll16, _mm512_maskz_mul_round_ps(kAll16, _mm512_maskz_cvt_roundepi32_ps(kAll16, x, kTruncate),
                                        reciprocal, kTruncate));
}

// A state of at least 2^19 * frequency spills its low word. Only the quotients take 32 bits a lane: those of
// even lanes and those of odd ones.
template <int breaks>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE Step divide(const States& state, __m512i index, int segment,
                                           const Codes<breaks>& c, uint16_t*& next) {
  const __m512i even = pick_bytes(kLaneOrder.words[segment], index),
                odd = _mm512_maskz_srli_epi32(kAll16, even, 16);
  const __m512i frequency = pick(c.frequency, even), start = pick(c.start, even);
  const __mmask32 spill = _mm512_cmpge_epu16_mask(state.high, _mm512_slli_epi16(frequency, 3));
  const __m512i high = _mm512_maskz_mov_epi16(~spill, state.high);
  const __m512i low = _mm512_mask_mov_epi16(state.low, spill, state.high);
  put_words(state.low, spill, next);
  const __m512i a = quotient(_mm512_mask_mov_epi16(low, kOdd, _mm512_maskz_slli_epi32(kAll16, high, 16)),
                             _mm512_permutex2var_ps(c.reciprocal[0], even, c.reciprocal[1]));
  const __m512i b = quotient(_mm512_mask_mov_epi16(_mm512_maskz_srli_epi32(kAll16, low, 16), kOdd, high),
                             _mm512_permutex2var_ps(c.reciprocal[0], odd, c.reciprocal[1]));
  const __m512i words = _mm512_mask_mov_epi16(a, kOdd, _mm512_maskz_slli_epi32(kAll16, b, 16));
  __m512i rest = _mm512_sub_epi16(low, _mm512_mullo_epi16(words, frequency));
  const __mmask32 more = _mm512_cmpge_epu16_mask(rest, frequency);  // as in avx512::divide
  rest = _mm512_mask_sub_epi16(rest, more, rest, frequency);
  Step s;
  s.state.low = _mm512_slli_epi16(words, kProbabilityBits);
  s.state.low = _mm512_mask_add_epi16(s.state.low, more, s.state.low, _mm512_set1_epi16(kSlots));
  const __mmask32 carry = _mm512_mask_testn_epi16_mask(more, s.state.low, s.state.low);
  s.state.high = _mm512_mask_mov_epi16(_mm512_maskz_srli_epi32(kAll16, a, 4), kOdd,
                                       _mm512_maskz_slli_epi32(kAll16, b, kProbabilityBits));
  s.state.high = _mm512_mask_sub_epi16(s.state.high, carry, s.state.high, _mm512_set1_epi16(-1));
  s.place = _mm512_add_epi16(rest, start);
  s.mapped = _mm512_movepi16_mask(start);
  return s;
}

template <int breaks>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE void finish(const Step& s, const Codes<breaks>& c, States& state) {
  const __m512i cell = _mm512_srli_epi16(s.place, 7);  // the lookup takes the low five bits
  const __m512i place = _mm512_and_si512(s.place, _mm512_set1_epi16(kCellPositions - 1));
  __m512i number = pick(c.number[0], cell);
  for (int k = 0; k < breaks; ++k)
    number = _mm512_mask_permutexvar_epi16(number, _mm512_cmpgt_epu16_mask(place, pick(c.last[k], cell)),
                                           cell, c.number[k + 1]);
  const __m512i slot = _mm512_mask_add_epi16(s.place, s.mapped, s.place, number);
  state.high = s.state.high;
  state.low =
      _mm512_ternarylogic_epi32(s.state.low, slot, _mm512_set1_epi16(kSlots - 1), 0xF8);  // a | (b & c)
}

// What coding changes of a chunk, in registers: groups from `symbols` on, their last first.
template <int breaks>
struct CodedChunk {
  Codes<breaks> codes;
  const uint8_t* symbols;
  States x, y;
  uint16_t *a, *b;
  const Ahead ahead;

  GAUGEKIT_VBMI2 GAUGEKIT_INLINE CodedChunk(const Coder& c)
      : codes(load_codes<breaks>(*c.table)),
        symbols(c.symbols),
        x(load_states(c.states)),
        y(load_states(c.states + kSegmentLanes)),
        a(c.words[0]),
        b(c.words[1]),
        ahead(c.ahead) {}
  GAUGEKIT_VBMI2 GAUGEKIT_INLINE void leave(const Coder& c) const {
    store_states(x, c.states), store_states(y, c.states + kSegmentLanes);
    c.words[0] = a, c.words[1] = b;
  }
  GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i index(uint64_t group) const {
    return indices(_mm512_loadu_si512(symbols + group * kLanes), codes);
  }
};

// Codes `groups` whole groups by their cells, the last first.
template <int breaks>
GAUGEKIT_VBMI2 void encode_groups(const Coder& coder, uint64_t groups) {
  CodedChunk<breaks> c(coder);
  for (uint64_t g = groups; g--;) {
    const __m512i index = c.index(g);
    const Step s = divide(c.x, index, 0, c.codes, c.a), r = divide(c.y, index, 1, c.codes, c.b);
    finish(s, c.codes, c.x), finish(r, c.codes, c.y);
    c.ahead.ask(g);
  }
  c.leave(coder);
}

// The same of two chunks: the chains of one chunk's two segments leave half of the processor idle.
template <int breaks>
GAUGEKIT_VBMI2 void encode_groups_of_two(const Coder& first, const Coder& second, uint64_t groups) {
  CodedChunk<breaks> c(first), e(second);
  for (uint64_t g = groups; g--;) {
    const __m512i i = c.index(g), k = e.index(g);
    const Step s = divide(c.x, i, 0, c.codes, c.a), r = divide(c.y, i, 1, c.codes, c.b);
    const Step t = divide(e.x, k, 0, e.codes, e.a), u = divide(e.y, k, 1, e.codes, e.b);
    finish(s, c.codes, c.x), finish(r, c.codes, c.y), finish(t, e.codes, e.x), finish(u, e.codes, e.y);
    c.ahead.ask(g), e.ahead.ask(g);
  }
  c.leave(first), e.leave(second);
}

}  // namespace gaugekit::rans::vbmi2
#endif
