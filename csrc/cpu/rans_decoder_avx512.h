// 64 lanes in four AVX-512 registers. With at most 32 symbols their buckets are looked up in registers,
// otherwise slots are looked up in memory.
#pragma once

#include "common/isa.h"
#include "rans_decoder_avx2.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::avx512 {

// Full masks. The forms without a mask read a variable that GCC 12's header never sets, which warns in every
// function they are inlined into; these give the same instructions.
constexpr __mmask8 kAll8 = 0xFF;
constexpr __mmask16 kAll16 = 0xFFFF;
constexpr __mmask32 kAll32 = 0xFFFFFFFF;

struct Registers {
  __m512i bucket[2], part[2][2];
};

GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i lookup(const __m512i (&table)[2], __m512i index) {
  return _mm512_permutex2var_epi32(table[0], index, table[1]);
}

GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i look_up(const uint32_t* table, __m512i index) {
  alignas(64) uint32_t i[16];
  _mm512_store_si512(i, index);
  return _mm512_maskz_inserti64x4(kAll8, _mm512_castsi256_si512(avx2::look_up(table, i)),
                                  avx2::look_up(table, i + 8), 1);
}

// 16 lanes within a step. The symbols are where the table has them, the bits around them arbitrary.
struct Lanes {
  __m512i x, y, symbol;
};

// From state and slot to the state before words are taken, in two halves: a group's four vectors go through
// each half together, so that the processor's window holds work that does not wait for other work.
template <bool in_registers>
GAUGEKIT_AVX512 GAUGEKIT_INLINE void find(Lanes& v, const Registers& r, const uint32_t* slots) {
  if constexpr (in_registers) {
    const __m512i index =
        _mm512_maskz_srli_epi32(kAll16, v.x, 7);  // the lookup takes the low five bits: the bucket
    const __m512i bucket = lookup(r.bucket, index);
    const __mmask16 second = _mm512_cmpgt_epu32_mask(_mm512_maskz_slli_epi32(kAll16, v.x, 25), bucket);
    v.y = _mm512_mask_mov_epi32(lookup(r.part[0], index), second, lookup(r.part[1], index));
    v.symbol = _mm512_mask_srli_epi32(bucket, second, bucket, 8);
  } else {
    const __m512i index = _mm512_and_si512(v.x, _mm512_set1_epi32(kSlots - 1));
    v.symbol = look_up(slots, index);
  }
}

template <bool in_registers>
GAUGEKIT_AVX512 GAUGEKIT_INLINE void advance(Lanes& v) {
  const __m512i high = _mm512_maskz_srli_epi32(kAll16, v.x, kProbabilityBits);
  if constexpr (in_registers) {
    const __m512i place = _mm512_and_si512(v.x, _mm512_set1_epi32(127));
    const __m512i rank = _mm512_add_epi32(place, _mm512_maskz_srai_epi32(kAll16, v.y, 16));
    const __m512i frequency = _mm512_and_si512(v.y, _mm512_set1_epi32(0xFFFF));
    v.y = _mm512_add_epi32(_mm512_mullo_epi32(frequency, high), rank);
  } else {
    const __m512i rank =
        _mm512_and_si512(_mm512_maskz_srli_epi32(kAll16, v.symbol, 8), _mm512_set1_epi32(kSlots - 1));
    v.y = _mm512_mullo_epi32(_mm512_maskz_srli_epi32(kAll16, v.symbol, 20), high);
    v.y = _mm512_add_epi32(v.y, _mm512_add_epi32(high, rank));
  }
}

// Deals words to the lanes in need, lowest first.
GAUGEKIT_AVX512 GAUGEKIT_INLINE void refill(Lanes& v, const uint8_t*& next) {
  const __mmask16 low = _mm512_cmplt_epu32_mask(v.y, _mm512_set1_epi32(kStateLower));
  const __m512i words =
      _mm512_maskz_cvtepu16_epi32(kAll16, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)));
  next += 2 * size_t(__builtin_popcount(low));
  v.x = _mm512_mask_or_epi32(v.y, low, _mm512_maskz_slli_epi32(kAll16, v.y, 16),
                             _mm512_maskz_expand_epi32(low, words));
}

// The symbols of a segment's 32 elements in the low bytes of 16-bit lanes, in order.
GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i in_order(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_maskz_slli_epi32(kAll16, odd, 16));
}

// The 64 six-bit remainders of a group: the first 48 are the bytes' low six bits, the last 16 their high two.
GAUGEKIT_AVX512 GAUGEKIT_INLINE void six_bits(const uint8_t* plane, __m256i& first, __m256i& second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane));
  const __m128i last = _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + 32));
  const __m128i a = _mm_srli_epi16(_mm256_castsi256_si128(low), 6);
  const __m128i b = _mm_srli_epi16(_mm256_extracti128_si256(low, 1), 4), c = _mm_srli_epi16(last, 2);
  const __m128i top =
      _mm_or_si128(_mm_or_si128(_mm_and_si128(a, _mm_set1_epi8(0x03)), _mm_and_si128(b, _mm_set1_epi8(0x0C))),
                   _mm_and_si128(c, _mm_set1_epi8(0x30)));
  first = _mm256_and_si256(low, _mm256_set1_epi8(0x3F));
  second = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_and_si128(last, _mm_set1_epi8(0x3F))), top, 1);
}

GAUGEKIT_AVX512 GAUGEKIT_INLINE void put_with_six(__m512i symbols, __m256i six, int shift, uint8_t* out) {
  const __m512i raw = _mm512_cvtepu8_epi16(six);
  __m512i y = _mm512_and_si512(symbols, _mm512_set1_epi16(0xFF));
  const __mmask32 high = _mm512_cmpge_epu16_mask(y, _mm512_set1_epi16(kZeroSymbols));
  y = _mm512_slli_epi16(_mm512_mask_add_epi16(y, high, y, _mm512_set1_epi16(short(shift))), 5);
  y = _mm512_ternarylogic_epi32(y, raw, _mm512_set1_epi16(0x1F), 0xF8);
  y = _mm512_ternarylogic_epi32(y, _mm512_slli_epi16(raw, 10), _mm512_set1_epi16(-0x8000), 0xF8);
  _mm512_storeu_si512(out, y);
}

// `symbols` have theirs at symbol_place(output). 0xCA chooses bits: a ? b : c.
template <Output output>
GAUGEKIT_AVX512 GAUGEKIT_INLINE void put(__m512i symbols, const uint8_t* plane, uint8_t* out) {
  if constexpr (output == Output::symbols) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_maskz_cvtepi16_epi8(kAll32, symbols));
  } else {
    __m512i raw = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane)));
    if (output == Output::exponent16) raw = _mm512_mullo_epi16(raw, _mm512_set1_epi16(257));  // in both bytes
    const __m512i mask = _mm512_set1_epi16(short(0xFF << symbol_place(output)));
    _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(mask, symbols, raw, 0xCA));
  }
}

template <bool in_registers, Output output>
GAUGEKIT_AVX512 int groups(Decoder& d, int groups, const uint8_t* plane, uint8_t* out) {
  Registers r;
  for (int half = 0; half < 2; ++half) {
    r.bucket[half] = _mm512_load_si512(d.table.bucket + 16 * half);
    for (int p = 0; p < 2; ++p) r.part[p][half] = _mm512_load_si512(d.table.part[p] + 16 * half);
  }
  const uint32_t* slots = d.table.slot;
  Lanes v[4];
  for (int i = 0; i < 4; ++i) v[i].x = _mm512_load_si512(d.states + 16 * i);
  const uint8_t *a = d.words[0].next, *b = d.words[1].next;
  const uint8_t *const a_safe = d.words[0].safe, *const b_safe = d.words[1].safe;
  constexpr int bytes = output_bytes(output);
  CrcLanes crc = d.crc;
  const uint8_t* check = d.check;
  int done = 0;
  for (; done < groups && a <= a_safe && b <= b_safe; ++done) {
    for (Lanes& lanes : v) find<in_registers>(lanes, r, slots);
    for (Lanes& lanes : v) advance<in_registers>(lanes);
    __m512i first = in_order(v[0].symbol, v[1].symbol), second = in_order(v[2].symbol, v[3].symbol);
    if constexpr (!in_registers) {
      first = _mm512_slli_epi16(first, symbol_place(output));
      second = _mm512_slli_epi16(second, symbol_place(output));
    }
    if constexpr (output == Output::exponent_and_two) {
      __m256i six[2];
      six_bits(plane, six[0], six[1]);
      put_with_six(first, six[0], d.shift, out);
      put_with_six(second, six[1], d.shift, out + kSegmentLanes * bytes);
    } else {
      put<output>(first, plane, out);
      put<output>(second, plane + kSegmentLanes, out + kSegmentLanes * bytes);
    }
    if constexpr (output != Output::symbols) avx2::check_group(crc, check), check += CrcLanes::kStep;
    avx2::prefetch_streams(a, b, plane, out);
    refill(v[0], a);
    refill(v[2], b);
    refill(v[1], a);
    refill(v[3], b);
    plane += group_plane_bytes(output);
    out += kLanes * bytes;
  }
  for (int i = 0; i < 4; ++i) _mm512_store_si512(d.states + 16 * i, v[i].x);
  d.crc = crc;
  d.check = check;
  d.words[0].next = a;
  d.words[1].next = b;
  return done;
}

}  // namespace gaugekit::rans::avx512
#endif
