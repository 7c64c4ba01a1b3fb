// 64 lanes as two segments of 32, each state x in two registers of 16-bit lanes: x = 2^15 * high + low, where
// low may be 2^15 or more. So no step waits for a carry. Buckets are looked up in tables of 32 or 64 entries
// of 16 bits, one or two registers each, and one instruction deals a segment's words (AVX512-VBMI2). For at
// most 32 symbols, none of them more frequent than 1/2: then low stays below 2^16.
#pragma once

#include "common/isa.h"
#include "rans_decoder_avx512.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::vbmi2 {

using avx512::kAll32;
constexpr __mmask64 kAll64 = ~__mmask64(0);

// Where a register of 16-bit lanes takes its words from, of one register or of two.
struct Order {
  alignas(64) uint16_t low[32], high[32], first[32], second[32], elements[32];
  alignas(64) uint8_t bytes_twice[64];
};

constexpr Order make_order() {
  Order order{};
  for (int i = 0; i < 32; ++i) {
    order.low[i] = uint16_t(2 * i), order.high[i] = uint16_t(2 * i + 1);
    order.first[i] = uint16_t(i / 2 + 32 * (i % 2));
    order.second[i] = uint16_t(16 + order.first[i]);
    order.elements[i] = uint16_t(i / 2 + 16 * (i % 2));  // the lane of element i
    order.bytes_twice[2 * i] = order.bytes_twice[2 * i + 1] = uint8_t(i);
  }
  return order;
}

inline constexpr Order kOrder = make_order();

// 32 states, and within a step what is known of them: where the tables have their symbols, and then those.
struct Segment {
  __m512i low, high, symbol;
};

struct Registers {
  __m512i last, frequency[2], rank[2], symbol[2];
};

GAUGEKIT_VBMI2 GAUGEKIT_INLINE Registers load_registers(const HalfTable& t) {
  return {_mm512_load_si512(t.last),
          {_mm512_load_si512(t.frequency[0]), _mm512_load_si512(t.frequency[1])},
          {_mm512_load_si512(t.rank[0]), _mm512_load_si512(t.rank[1])},
          {_mm512_load_si512(t.symbol[0]), _mm512_load_si512(t.symbol[1])}};
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i look_up(const __m512i (&table)[2], __m512i index) {
  return _mm512_permutex2var_epi16(table[0], index, table[1]);
}

// A step, in three parts so that those of several segments can go through each together, and the processor's
// window holds work that does not wait for other work.
GAUGEKIT_VBMI2 GAUGEKIT_INLINE void find(Segment& s, const Registers& r) {
  const __m512i slot = _mm512_and_si512(s.low, _mm512_set1_epi16(kSlots - 1));
  const __m512i bucket = _mm512_srli_epi16(slot, 7);
  const __m512i last = _mm512_maskz_permutexvar_epi16(kAll32, bucket, r.last);
  const __mmask32 second = _mm512_cmpgt_epu16_mask(slot, last);
  s.symbol = _mm512_mask_sub_epi16(bucket, second, bucket, _mm512_set1_epi16(-32));
}

// x = f * (x >> 12) + rank, where x >> 12 = 8 * high + (low >> 12): 8 * f * high in both halves, and the rest
// to the low one. The table has 16 * f.
GAUGEKIT_VBMI2 GAUGEKIT_INLINE void multiply(Segment& s, const Registers& r) {
  const __m512i frequency = look_up(r.frequency, s.symbol);
  const __m512i slot = _mm512_and_si512(s.low, _mm512_set1_epi16(kSlots - 1));
  const __m512i rank = _mm512_add_epi16(look_up(r.rank, s.symbol), slot);
  const __m512i above = _mm512_and_si512(s.low, _mm512_set1_epi16(-int(kSlots)));
  const __m512i rest = _mm512_add_epi16(_mm512_mulhi_epu16(frequency, above), rank);
  s.low = _mm512_add_epi16(_mm512_srli_epi16(_mm512_mullo_epi16(frequency, s.high), 1), rest);
  s.high = _mm512_mulhi_epu16(frequency, s.high);
  s.symbol = look_up(r.symbol, s.symbol);
}

// x = x << 16 | word where x < 2^15.
GAUGEKIT_VBMI2 GAUGEKIT_INLINE void refill(Segment& s, const uint8_t*& next) {
  const __m512i bits = _mm512_ternarylogic_epi32(s.high, s.low, _mm512_set1_epi16(-0x8000), 0xF8);
  const __mmask32 small = _mm512_testn_epi16_mask(bits, bits);
  s.high = _mm512_mask_add_epi16(s.high, small, s.low, s.low);
  __m512i words = _mm512_loadu_si512(next);
  asm("" : "+v"(words));  // in a register: from memory the instruction may be microcoded
  s.low = _mm512_mask_expand_epi16(s.low, small, words);
  next += 2 * size_t(__builtin_popcount(small));
}

// `symbols` have theirs at symbol_place(output). 0xCA chooses bits: a ? b : c.
template <Output output>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE void put(__m512i symbols, const uint8_t* plane, uint8_t* out) {
  symbols = _mm512_maskz_permutexvar_epi16(kAll32, _mm512_load_si512(kOrder.elements), symbols);
  if constexpr (output == Output::symbols) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_maskz_cvtepi16_epi8(kAll32, symbols));
  } else {
    const __m512i raw = _mm512_maskz_permutexvar_epi8(
        kAll64, _mm512_load_si512(kOrder.bytes_twice),
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane))));
    const __m512i mask = _mm512_set1_epi16(short(0xFF << symbol_place(output)));
    _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(mask, symbols, raw, 0xCA));
  }
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE Segment load_segment(const uint32_t* states) {
  const __m512i a = _mm512_load_si512(states), b = _mm512_load_si512(states + 16);
  const __m512i low = _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.low), b);
  const __m512i high = _mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder.high), b);
  return {_mm512_and_si512(low, _mm512_set1_epi16(0x7FFF)), _mm512_shldi_epi16(high, low, 1), __m512i{}};
}

GAUGEKIT_VBMI2 GAUGEKIT_INLINE void store_segment(const Segment& s, uint32_t* states) {
  for (int half = 0; half < 2; ++half) {
    const __m512i order = _mm512_load_si512(half ? kOrder.second : kOrder.first), none = __m512i{};
    const __m512i low = _mm512_permutex2var_epi16(s.low, order, none);
    const __m512i high = _mm512_permutex2var_epi16(s.high, order, none);
    _mm512_store_si512(states + 16 * half,
                       _mm512_add_epi32(_mm512_maskz_slli_epi32(avx512::kAll16, high, 15), low));
  }
}

// What a kernel changes of a chunk, in registers.
template <Output output>
struct Chunk {
  Segment first, second;
  const uint8_t *a, *b, *a_safe, *b_safe, *check, *plane;
  uint8_t* out;
  CrcLanes crc;

  GAUGEKIT_VBMI2 GAUGEKIT_INLINE Chunk(const Decoder& d, Streams streams)
      : first(load_segment(d.states)),
        second(load_segment(d.states + kSegmentLanes)),
        a(d.words[0].next),
        b(d.words[1].next),
        a_safe(d.words[0].safe),
        b_safe(d.words[1].safe),
        check(d.check),
        plane(streams.plane),
        out(streams.out),
        crc(d.crc) {}
  GAUGEKIT_VBMI2 GAUGEKIT_INLINE void leave(Decoder& d) const {
    store_segment(first, d.states);
    store_segment(second, d.states + kSegmentLanes);
    d.crc = crc;
    d.check = check;
    d.words[0].next = a;
    d.words[1].next = b;
  }
  bool has_words() const { return a <= a_safe && b <= b_safe; }

  GAUGEKIT_VBMI2 GAUGEKIT_INLINE void put_group() {
    put<output>(first.symbol, plane, out);
    put<output>(second.symbol, plane + kSegmentLanes, out + kSegmentLanes * output_bytes(output));
    if constexpr (output != Output::symbols) avx2::check_group(crc, check), check += CrcLanes::kStep;
    avx2::prefetch_streams(a, b, plane, out);
    plane += group_plane_bytes(output);
    out += kLanes * output_bytes(output);
  }
};

template <Output output>
GAUGEKIT_VBMI2 int groups(Decoder& d, int groups, const uint8_t* plane, uint8_t* out) {
  const Registers r = load_registers(d.table.halves);
  Chunk<output> c(d, {plane, out});
  int done = 0;
  for (; done < groups && c.has_words(); ++done) {
    find(c.first, r), find(c.second, r);
    multiply(c.first, r), multiply(c.second, r);
    refill(c.first, c.a), refill(c.second, c.b);
    c.put_group();
  }
  c.leave(d);
  return done;
}

// The chains of one chunk's two segments leave half of the processor idle.
template <Output output>
GAUGEKIT_VBMI2 int groups_of_two(Decoder& d0, Decoder& d1, int groups, Streams s0, Streams s1) {
  const Registers r = load_registers(d0.table.halves), q = load_registers(d1.table.halves);
  Chunk<output> c(d0, s0), e(d1, s1);
  int done = 0;
  for (; done < groups && c.has_words() && e.has_words(); ++done) {
    find(c.first, r), find(c.second, r), find(e.first, q), find(e.second, q);
    multiply(c.first, r), multiply(c.second, r), multiply(e.first, q), multiply(e.second, q);
    refill(c.first, c.a), refill(c.second, c.b), refill(e.first, e.a), refill(e.second, e.b);
    c.put_group(), e.put_group();
  }
  c.leave(d0), e.leave(d1);
  return done;
}

}  // namespace gaugekit::rans::vbmi2
#endif
