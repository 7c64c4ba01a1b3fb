// 64 lanes in eight AVX2 registers; slots are looked up in memory, words are dealt to lanes by a table of
// permutations.
#pragma once

#include <array>

#include "common/isa.h"
#include "rans_decoder_table.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::avx2 {

// deal[mask][lane]: which of the next words a lane takes, that is how many lower lanes take one.
using Deal = std::array<std::array<uint8_t, 8>, 256>;

constexpr Deal make_deal() {
  Deal deal{};
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 0, taken = 0; lane < 8; ++lane) {
      deal[mask][lane] = uint8_t(taken);
      taken += mask >> lane & 1;
    }
  return deal;
}

inline constexpr Deal kDeal = make_deal();

GAUGEKIT_AVX2 GAUGEKIT_INLINE __m128i look_up_pair(const uint32_t* slots, const uint32_t* i) {
  return _mm_insert_epi32(_mm_cvtsi32_si128(int(slots[i[0]])), int(slots[i[1]]), 1);
}

// Eight loads: the gather instruction takes several times as long on processors whose microcode keeps it from
// leaking data.
GAUGEKIT_AVX2 GAUGEKIT_INLINE __m256i look_up(const uint32_t* slots, __m256i index) {
  alignas(32) uint32_t i[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(i), index);
  const __m128i low = _mm_unpacklo_epi64(look_up_pair(slots, i), look_up_pair(slots, i + 2));
  const __m128i high = _mm_unpacklo_epi64(look_up_pair(slots, i + 4), look_up_pair(slots, i + 6));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

GAUGEKIT_AVX2 GAUGEKIT_INLINE __m256i step(__m256i& x, const uint32_t* slots, const uint8_t*& next) {
  const __m256i low = _mm256_set1_epi32(kSlots - 1);
  const __m256i symbol = look_up(slots, _mm256_and_si256(x, low));
  const __m256i high = _mm256_srli_epi32(x, kProbabilityBits);
  const __m256i rank = _mm256_and_si256(_mm256_srli_epi32(symbol, 8), low);
  __m256i y = _mm256_mullo_epi32(_mm256_srli_epi32(symbol, 20), high);
  y = _mm256_add_epi32(y, _mm256_add_epi32(high, rank));
  const __m256i refill = _mm256_cmpgt_epi32(_mm256_set1_epi32(kStateLower), y);
  const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(refill));
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(next)));
  next += 2 * __builtin_popcount(mask);
  const __m256i deal =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kDeal[mask].data())));
  const __m256i refilled =
      _mm256_or_si256(_mm256_slli_epi32(y, 16), _mm256_permutevar8x32_epi32(words, deal));
  x = _mm256_blendv_epi8(y, refilled, refill);
  return symbol;
}

// The symbols of 16 elements in 16-bit lanes, in order.
GAUGEKIT_AVX2 GAUGEKIT_INLINE __m256i in_order(__m256i even, __m256i odd) {
  return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
}

template <Output output>
GAUGEKIT_AVX2 GAUGEKIT_INLINE void put(__m256i first, __m256i second, const uint8_t* plane, uint8_t* out) {
  __m256i* to = reinterpret_cast<__m256i*>(out);
  if constexpr (output == Output::symbols) {
    const __m256i low = _mm256_set1_epi16(0xFF);
    const __m256i packed = _mm256_packus_epi16(_mm256_and_si256(first, low), _mm256_and_si256(second, low));
    _mm256_storeu_si256(to, _mm256_permute4x64_epi64(packed, 0xD8));
  } else {
    for (int half = 0; half < 2; ++half) {
      const __m256i raw =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + 16 * half)));
      __m256i y = _mm256_slli_epi16(half ? second : first, 8);
      if constexpr (output == Output::exponent16) {
        const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(raw, 8), _mm256_set1_epi16(-0x8000));
        y = _mm256_or_si256(_mm256_srli_epi16(y, 1), sign);
        y = _mm256_or_si256(y, _mm256_and_si256(raw, _mm256_set1_epi16(0x7F)));
      } else {
        y = _mm256_or_si256(y, raw);
      }
      _mm256_storeu_si256(to + half, y);
    }
  }
}

// 16 elements from their symbols and six-bit remainders.
GAUGEKIT_AVX2 GAUGEKIT_INLINE void put_with_six(__m256i symbols, __m128i six, __m256i shift, uint8_t* out) {
  const __m256i raw = _mm256_cvtepu8_epi16(six), code = _mm256_and_si256(symbols, _mm256_set1_epi16(0xFF));
  const __m256i high = _mm256_cmpgt_epi16(code, _mm256_set1_epi16(kZeroSymbols - 1));
  __m256i y = _mm256_slli_epi16(_mm256_add_epi16(code, _mm256_and_si256(high, shift)), 5);
  y = _mm256_or_si256(y, _mm256_and_si256(raw, _mm256_set1_epi16(0x1F)));
  y = _mm256_or_si256(y, _mm256_and_si256(_mm256_slli_epi16(raw, 10), _mm256_set1_epi16(-0x8000)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), y);
}

template <Output output>
GAUGEKIT_AVX2 int groups(Decoder& d, int groups, const uint8_t* plane, uint8_t* out) {
  const uint32_t* slots = d.table.slot;
  const __m256i* states = reinterpret_cast<const __m256i*>(d.states);
  __m256i x[8];
  for (int i = 0; i < 8; ++i) x[i] = _mm256_load_si256(states + i);
  const uint8_t *a = d.words[0].next, *b = d.words[1].next;
  const uint8_t *const a_safe = d.words[0].safe, *const b_safe = d.words[1].safe;
  constexpr int bytes = output_bytes(output);
  int done = 0;
  for (; done < groups && a <= a_safe && b <= b_safe; ++done) {
    __m256i s[8];
    for (int i = 0; i < 4; ++i) {
      s[i] = step(x[i], slots, a);
      s[4 + i] = step(x[4 + i], slots, b);
    }
    if constexpr (output == Output::exponent_and_two) {
      const __m128i* p = reinterpret_cast<const __m128i*>(plane);
      const __m128i a = _mm_loadu_si128(p), b = _mm_loadu_si128(p + 1), c = _mm_loadu_si128(p + 2);
      const __m128i low = _mm_set1_epi8(0x3F);
      const __m128i last =
          _mm_or_si128(_mm_or_si128(_mm_and_si128(_mm_srli_epi16(a, 6), _mm_set1_epi8(0x03)),
                                    _mm_and_si128(_mm_srli_epi16(b, 4), _mm_set1_epi8(0x0C))),
                       _mm_and_si128(_mm_srli_epi16(c, 2), _mm_set1_epi8(0x30)));
      const __m256i shift = _mm256_set1_epi16(short(d.shift));
      put_with_six(in_order(s[0], s[2]), _mm_and_si128(a, low), shift, out);
      put_with_six(in_order(s[1], s[3]), _mm_and_si128(b, low), shift, out + 32);
      put_with_six(in_order(s[4], s[6]), _mm_and_si128(c, low), shift, out + 64);
      put_with_six(in_order(s[5], s[7]), last, shift, out + 96);
    } else {
      put<output>(in_order(s[0], s[2]), in_order(s[1], s[3]), plane, out);
      put<output>(in_order(s[4], s[6]), in_order(s[5], s[7]), plane + kSegmentLanes,
                  out + kSegmentLanes * bytes);
    }
    plane += group_plane_bytes(output);
    out += kLanes * bytes;
  }
  __m256i* to = reinterpret_cast<__m256i*>(d.states);
  for (int i = 0; i < 8; ++i) _mm256_store_si256(to + i, x[i]);
  d.words[0].next = a;
  d.words[1].next = b;
  return done;
}

}  // namespace gaugekit::rans::avx2
#endif
