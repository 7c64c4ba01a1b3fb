// 64 lanes as two segments of 32, each state in two halves of 16 bits: a register holds the low halves of a
// whole segment, another the high ones. Buckets are looked up in tables of 32 entries of 16 bits, one
// register each, and one instruction deals a segment's words (AVX512-VBMI2). For at most 32 symbols.
#pragma once

#include "common/isa.h"
#include "rans_decoder_avx512.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::vbmi2 {

using avx512::kAll32;

// Where a register of 16-bit lanes takes its words from, of one register or of two.
struct Order {
  alignas(64) uint16_t low[32], high[32], first[32], second[32], elements[32];
  alignas(64) uint8_t bytes_twice[64], bytes[64];
};

constexpr Order make_order() {
  Order order{};
  for (int i = 0; i < 32; ++i) {
    order.low[i] = uint16_t(2 * i), order.high[i] = uint16_t(2 * i + 1);
    order.first[i] = uint16_t(i / 2 + 32 * (i % 2));
    order.second[i] = uint16_t(16 + order.first[i]);
    order.elements[i] = uint16_t(i / 2 + 16 * (i % 2));  // the lane of element i
    order.bytes_twice[2 * i] = order.bytes_twice[2 * i + 1] = uint8_t(i);
    order.bytes[i] = uint8_t(2 * order.elements[i]);
  }
  return order;
}

inline constexpr Order kOrder = make_order();

// `step` leaves in `symbol` the lanes' symbols in the low bytes.
struct Segment {
  __m512i low, high, symbol;
};

struct Registers {
  __m512i divider, second, frequency[2], rank[2];
};

GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i look_up(__m512i table, __m512i index) {
  return _mm512_maskz_permutexvar_epi16(kAll32, index, table);
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i choose(const __m512i (&table)[2], __m512i index, __mmask32 second) {
  return _mm512_mask_permutexvar_epi16(look_up(table[0], index), second, index, table[1]);
}

// x = frequency * (x >> 12) + rank for 31 bits in two halves; then a word below, where x < 2^15.
GAUGEKIT_VBMI2 GAUGEKIT_INLINE void step(Segment& s, const Registers& r, const uint8_t*& next) {
  const __m512i index = _mm512_srli_epi16(s.low, 7);  // the lookups take the low five bits: the bucket
  const __m512i entry = look_up(r.divider, index);
  const __mmask32 second = _mm512_cmpgt_epu16_mask(_mm512_slli_epi16(s.low, 9), entry);
  s.symbol = _mm512_mask_permutexvar_epi16(entry, second, index, r.second);
  const __m512i frequency = choose(r.frequency, index, second);
  const __m512i rank = _mm512_add_epi16(choose(r.rank, index, second),
                                        _mm512_and_si512(s.low, _mm512_set1_epi16(127)));
  const __m512i above = _mm512_shldi_epi16(s.high, s.low, 4), top = _mm512_srli_epi16(s.high, 12);
  const __m512i product = _mm512_mullo_epi16(frequency, above);
  __m512i high = _mm512_add_epi16(_mm512_mulhi_epu16(frequency, above), _mm512_mullo_epi16(frequency, top));
  const __m512i low = _mm512_add_epi16(product, rank);
  // That x < 2^15 is known before the carry is: a sum that has one is no small number.
  const __m512i bits =
      _mm512_ternarylogic_epi32(high, _mm512_adds_epu16(product, rank), _mm512_set1_epi16(-0x8000), 0xF8);
  const __mmask32 refill = _mm512_testn_epi16_mask(bits, bits);
  high = _mm512_mask_sub_epi16(high, _mm512_cmplt_epu16_mask(low, rank), high, _mm512_set1_epi16(-1));
  s.high = _mm512_mask_mov_epi16(high, refill, low);
  __m512i words = _mm512_loadu_si512(next);
  asm("" : "+v"(words));  // in a register: from memory the instruction may be microcoded
  s.low = _mm512_mask_expand_epi16(low, refill, words);
  next += 2 * size_t(__builtin_popcount(refill));
}

// 0xCA chooses bits: a ? b : c.
template <Output output>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE void put(__m512i symbols, const uint8_t* plane, uint8_t* out) {
  if constexpr (output == Output::symbols) {
    const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(kOrder.bytes), symbols);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(bytes));
  } else {
    const __m512i raw = _mm512_permutexvar_epi8(
        _mm512_load_si512(kOrder.bytes_twice),
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane))));
    symbols = _mm512_slli_epi16(symbols, symbol_place(output));
    symbols = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.elements), symbols);
    const __m512i mask = _mm512_set1_epi16(short(0xFF << symbol_place(output)));
    _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(mask, symbols, raw, 0xCA));
  }
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE Segment load_segment(const uint32_t* states) {
  const __m512i a = _mm512_load_si512(states), b = _mm512_load_si512(states + 16);
  return {_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.low), b),
          _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.high), b), __m512i{}};
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE void store_segment(const Segment& s, uint32_t* states) {
  _mm512_store_si512(states, _mm512_permutex2var_epi16(s.low, _mm512_load_si512(kOrder.first), s.high));
  _mm512_store_si512(states + 16,
                     _mm512_permutex2var_epi16(s.low, _mm512_load_si512(kOrder.second), s.high));
}

template <Output output>
GAUGEKIT_VBMI2 int groups(Decoder& d, int groups, const uint8_t* plane, uint8_t* out) {
  const HalfTable& t = d.table.halves;
  const Registers r = {_mm512_load_si512(t.divider),
                       _mm512_load_si512(t.second),
                       {_mm512_load_si512(t.frequency[0]), _mm512_load_si512(t.frequency[1])},
                       {_mm512_load_si512(t.rank[0]), _mm512_load_si512(t.rank[1])}};
  Segment first = load_segment(d.states), second = load_segment(d.states + kSegmentLanes);
  const uint8_t *a = d.words[0].next, *b = d.words[1].next;
  const uint8_t *const a_safe = d.words[0].safe, *const b_safe = d.words[1].safe;
  constexpr int bytes = output_bytes(output);
  CrcLanes crc = d.crc;
  const uint8_t* check = d.check;
  int done = 0;
  for (; done < groups && a <= a_safe && b <= b_safe; ++done) {
    step(first, r, a);
    step(second, r, b);
    put<output>(first.symbol, plane, out);
    put<output>(second.symbol, plane + kSegmentLanes, out + kSegmentLanes * bytes);
    if constexpr (output != Output::symbols) avx2::check_group(crc, check), check += CrcLanes::kStep;
    avx2::prefetch_streams(a, b, plane, out);
    plane += group_plane_bytes(output);
    out += kLanes * bytes;
  }
  store_segment(first, d.states);
  store_segment(second, d.states + kSegmentLanes);
  d.crc = crc;
  d.check = check;
  d.words[0].next = a;
  d.words[1].next = b;
  return done;
}

}  // namespace gaugekit::rans::vbmi2
#endif
