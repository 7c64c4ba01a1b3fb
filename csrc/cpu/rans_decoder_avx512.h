// 64 lanes in four AVX-512 registers. With at most 32 symbols their buckets are looked up in registers,
// otherwise slots are looked up in memory.
#pragma once

#include "common/isa.h"
#include "rans_decoder_avx2.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::avx512 {

struct Registers {
  __m512i bucket[2], part[2][2];
};

GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i lookup(const __m512i (&table)[2], __m512i index) {
  return _mm512_permutex2var_epi32(table[0], index, table[1]);
}

// One step of 16 lanes; their symbols come back in the low bytes, the other bits are arbitrary.
template <bool in_registers>
GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i step(__m512i& x, const Registers& r, const uint32_t* slots,
                                             const uint8_t*& next) {
  __m512i symbol, y;
  const __m512i high = _mm512_srli_epi32(x, kProbabilityBits);
  if constexpr (in_registers) {
    const __m512i index = _mm512_srli_epi32(x, 7);  // the lookup takes the low five bits: the bucket
    const __m512i bucket = lookup(r.bucket, index);
    const __mmask16 second = _mm512_cmpgt_epu32_mask(_mm512_slli_epi32(x, 25), bucket);
    const __m512i part = _mm512_mask_mov_epi32(lookup(r.part[0], index), second, lookup(r.part[1], index));
    symbol = _mm512_mask_srli_epi32(bucket, second, bucket, 8);
    const __m512i place = _mm512_and_si512(x, _mm512_set1_epi32(127));
    const __m512i rank = _mm512_add_epi32(place, _mm512_srai_epi32(part, 16));
    y = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_and_si512(part, _mm512_set1_epi32(0xFFFF)), high), rank);
  } else {
    const __m512i low = _mm512_set1_epi32(kSlots - 1);
    const __m512i index = _mm512_and_si512(x, low);
    symbol = _mm512_inserti64x4(_mm512_castsi256_si512(avx2::look_up(slots, _mm512_castsi512_si256(index))),
                                avx2::look_up(slots, _mm512_extracti64x4_epi64(index, 1)), 1);
    const __m512i rank = _mm512_and_si512(_mm512_srli_epi32(symbol, 8), low);
    y = _mm512_mullo_epi32(_mm512_srli_epi32(symbol, 20), high);
    y = _mm512_add_epi32(y, _mm512_add_epi32(high, rank));
  }
  const __mmask16 refill = _mm512_cmplt_epu32_mask(y, _mm512_set1_epi32(kStateLower));
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)));
  next += 2 * __builtin_popcount(refill);
  x = _mm512_mask_or_epi32(y, refill, _mm512_slli_epi32(y, 16), _mm512_maskz_expand_epi32(refill, words));
  return symbol;
}

// The symbols of a segment's 32 elements in the low bytes of 16-bit lanes, in order.
GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i in_order(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, 16));
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

template <Output output>
GAUGEKIT_AVX512 GAUGEKIT_INLINE void put(__m512i symbols, const uint8_t* plane, uint8_t* out) {
  if constexpr (output == Output::symbols) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(symbols));
  } else {
    const __m512i raw = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane)));
    __m512i y = _mm512_slli_epi16(symbols, 8);
    if constexpr (output == Output::high16) {
      y = _mm512_or_si512(y, raw);
    } else {  // 0xF8 is a | (b & c)
      y = _mm512_ternarylogic_epi32(_mm512_srli_epi16(y, 1), raw, _mm512_set1_epi16(0x7F), 0xF8);
      y = _mm512_ternarylogic_epi32(y, _mm512_slli_epi16(raw, 8), _mm512_set1_epi16(-0x8000), 0xF8);
    }
    _mm512_storeu_si512(out, y);
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
  __m512i x0 = _mm512_load_si512(d.states), x1 = _mm512_load_si512(d.states + 16);
  __m512i x2 = _mm512_load_si512(d.states + 32), x3 = _mm512_load_si512(d.states + 48);
  const uint8_t *a = d.words[0].next, *b = d.words[1].next;
  const uint8_t *const a_safe = d.words[0].safe, *const b_safe = d.words[1].safe;
  constexpr int bytes = output_bytes(output);
  int done = 0;
  for (; done < groups && a <= a_safe && b <= b_safe; ++done) {
    const __m512i s0 = step<in_registers>(x0, r, slots, a), s2 = step<in_registers>(x2, r, slots, b);
    const __m512i s1 = step<in_registers>(x1, r, slots, a), s3 = step<in_registers>(x3, r, slots, b);
    if constexpr (output == Output::exponent_and_two) {
      __m256i first, second;
      six_bits(plane, first, second);
      put_with_six(in_order(s0, s1), first, d.shift, out);
      put_with_six(in_order(s2, s3), second, d.shift, out + kSegmentLanes * bytes);
    } else {
      put<output>(in_order(s0, s1), plane, out);
      put<output>(in_order(s2, s3), plane + kSegmentLanes, out + kSegmentLanes * bytes);
    }
    plane += group_plane_bytes(output);
    out += kLanes * bytes;
  }
  _mm512_store_si512(d.states, x0);
  _mm512_store_si512(d.states + 16, x1);
  _mm512_store_si512(d.states + 32, x2);
  _mm512_store_si512(d.states + 48, x3);
  d.words[0].next = a;
  d.words[1].next = b;
  return done;
}

}  // namespace gaugekit::rans::avx512
#endif
