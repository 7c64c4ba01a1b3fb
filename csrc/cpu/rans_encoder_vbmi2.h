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

// Of a group's 64 elements, those of the lanes: as 16-bit lanes of each segment, and as 32-bit lanes of each
// of its halves. And 16-bit lanes of a half as 32-bit ones.
struct LaneOrder {
  alignas(64) uint8_t words[2][64], floats[2][2][64];
  alignas(64) uint16_t wide[2][32];
};

constexpr LaneOrder make_lane_order() {
  LaneOrder order{};
  for (int segment = 0; segment < 2; ++segment)
    for (int lane = 0; lane < kSegmentLanes; ++lane) {
      const uint8_t element = uint8_t(kSegmentLanes * segment + lane_element(lane));
      for (int byte = 0; byte < 2; ++byte) order.words[segment][2 * lane + byte] = element;
      for (int byte = 0; byte < 4; ++byte) order.floats[segment][lane / 16][4 * (lane % 16) + byte] = element;
    }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 16; ++i) order.wide[half][2 * i] = uint16_t(16 * half + i);
  return order;
}

inline constexpr LaneOrder kLaneOrder = make_lane_order();

// By index in the table: EncoderCells in 16-bit lanes, and reciprocals; and by symbol the index.
template <int breaks>
struct Codes {
  __m512i frequency, start, number[breaks + 1], last[breaks];
  __m512i most[2];  // a state at which a word is spilled
  __m512 reciprocal[2];
  __m512i index[4];
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
  c.frequency = half_table(t.cells.code, 0, all), c.start = half_table(t.cells.code, 16, all);
  c.number[0] = half_table(t.cells.at[0], 0, number);
  for (int k = 0; k < breaks; ++k) {
    c.number[k + 1] = half_table(t.cells.at[k], k ? 0 : 12, number);
    c.last[k] = half_table(t.cells.at[k], 25, all);
  }
  for (int half = 0; half < 2; ++half) {
    const __m512i code = _mm512_loadu_si512(t.cells.code + 16 * half);
    c.reciprocal[half] = avx512::reciprocal_of(code);
    c.most[half] = _mm512_maskz_slli_epi32(kAll16, code, 19);
  }
  alignas(64) uint8_t index[256] = {};
  for (int i = 0; i < t.table.size; ++i) index[t.table.symbol[i]] = uint8_t(i);
  for (int k = 0; k < 4; ++k) c.index[k] = _mm512_load_si512(index + 64 * k);
  return c;
}

template <int breaks>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i indices(__m512i symbols, const Codes<breaks>& c) {
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

// One segment's step, in two parts: the states' quotients by the frequencies with what is left, and the
// states that follow. `place` is the rank behind its symbol's start.
struct Step {
  __m512i quotient[2], place;
  __mmask32 mapped;
};

GAUGEKIT_VBMI2 GAUGEKIT_INLINE void put_words(__m512i words, __mmask32 spill, uint16_t*& next) {
  const int spilled = __builtin_popcount(spill);
  next -= spilled;
  _mm512_mask_storeu_epi16(next, __mmask32((uint64_t(1) << spilled) - 1),
                           _mm512_maskz_compress_epi16(spill, words));
}

template <int breaks>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE Step divide(const __m512i (&state)[2], __m512i index, int segment,
                                           const Codes<breaks>& c, uint16_t*& next) {
  const __m512i words = pick_bytes(kLaneOrder.words[segment], index);
  const __m512i frequency = pick(c.frequency, words), start = pick(c.start, words);
  const __m512i lows = _mm512_load_si512(kOrder.low);
  Step s;
  __m512i x[2];
  __mmask16 spill[2];
  for (int half = 0; half < 2; ++half) {
    const __m512i lane = pick_bytes(kLaneOrder.floats[segment][half], index);
    spill[half] = _mm512_cmpge_epu32_mask(state[half], avx512::lookup(c.most, lane));
    x[half] = _mm512_mask_srli_epi32(state[half], spill[half], state[half], 16);
    s.quotient[half] = _mm512_maskz_cvttps_epi32(
        kAll16,
        _mm512_maskz_mul_round_ps(kAll16, _mm512_maskz_cvt_roundepi32_ps(kAll16, x[half], kTruncate),
                                  _mm512_permutex2var_ps(c.reciprocal[0], lane, c.reciprocal[1]), kTruncate));
  }
  put_words(_mm512_permutex2var_epi16(state[0], lows, state[1]), _mm512_kunpackw(spill[1], spill[0]), next);
  const __m512i low = _mm512_permutex2var_epi16(x[0], lows, x[1]);
  const __m512i quotient = _mm512_permutex2var_epi16(s.quotient[0], lows, s.quotient[1]);
  __m512i rest = _mm512_sub_epi16(low, _mm512_mullo_epi16(quotient, frequency));
  const __mmask32 more = _mm512_cmpge_epu16_mask(rest, frequency);  // as in avx512::divide
  for (int half = 0; half < 2; ++half)
    s.quotient[half] = _mm512_mask_sub_epi32(s.quotient[half], __mmask16(more >> (16 * half)),
                                             s.quotient[half], _mm512_set1_epi32(-1));
  rest = _mm512_mask_sub_epi16(rest, more, rest, frequency);
  s.place = _mm512_add_epi16(rest, start);
  s.mapped = _mm512_movepi16_mask(start);
  return s;
}

template <int breaks>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE void finish(const Step& s, const Codes<breaks>& c, __m512i (&state)[2]) {
  const __m512i cell = _mm512_srli_epi16(s.place, 7);  // the lookup takes the low five bits
  const __m512i place = _mm512_and_si512(s.place, _mm512_set1_epi16(kCellPositions - 1));
  __m512i number = pick(c.number[0], cell);
  for (int k = 0; k < breaks; ++k)
    number = _mm512_mask_mov_epi16(number, _mm512_cmpgt_epu16_mask(place, pick(c.last[k], cell)),
                                   pick(c.number[k + 1], cell));
  const __m512i slot = _mm512_mask_add_epi16(s.place, s.mapped, s.place, number);
  for (int half = 0; half < 2; ++half) {
    const __m512i wide =
        _mm512_maskz_permutexvar_epi16(kAll32, _mm512_load_si512(kLaneOrder.wide[half]), slot);
    state[half] =
        _mm512_ternarylogic_epi32(_mm512_maskz_slli_epi32(kAll16, s.quotient[half], kProbabilityBits), wide,
                                  _mm512_set1_epi32(kSlots - 1), 0xF8);  // a | (b & c)
  }
}

// As avx512::encode_groups, with cells.
template <int breaks>
GAUGEKIT_VBMI2 void encode_groups(const uint8_t* symbols, uint64_t groups, const EncoderTable& t,
                                  uint32_t* states, uint16_t** words, const Ahead& ahead) {
  const Codes<breaks> codes = load_codes<breaks>(t);
  __m512i x[2] = {_mm512_loadu_si512(states), _mm512_loadu_si512(states + 16)};
  __m512i y[2] = {_mm512_loadu_si512(states + 32), _mm512_loadu_si512(states + 48)};
  uint16_t *a = words[0], *b = words[1];
  for (uint64_t g = groups; g--;) {
    const __m512i index = indices(_mm512_loadu_si512(symbols + g * kLanes), codes);
    const Step s = divide(x, index, 0, codes, a), r = divide(y, index, 1, codes, b);
    finish(s, codes, x), finish(r, codes, y);
    ahead.ask(g);
  }
  for (int half = 0; half < 2; ++half) {
    _mm512_storeu_si512(states + 16 * half, x[half]);
    _mm512_storeu_si512(states + 32 + 16 * half, y[half]);
  }
  words[0] = a;
  words[1] = b;
}

}  // namespace gaugekit::rans::vbmi2
#endif
