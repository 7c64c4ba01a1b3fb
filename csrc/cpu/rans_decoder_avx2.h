// 64 lanes in eight AVX2 registers; slots are looked up in memory, words are dealt to lanes by a table of
// permutations.
#pragma once

#include <array>

#include "common/isa.h"
#include "rans_decoder_table.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::avx2 {

// deal[mask]: the byte shuffle that gives each lane of the mask, in their order, the next word, and the other
// lanes zero.
using Deal = std::array<std::array<uint8_t, 32>, 256>;

constexpr Deal make_deal() {
  Deal deal{};
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 0, taken = 0; lane < 8; ++lane) {
      const bool takes = mask >> lane & 1;
      for (int byte = 0; byte < 4; ++byte)
        deal[mask][4 * lane + byte] = uint8_t(takes && byte < 2 ? 2 * taken + byte : 0x80);
      taken += takes;
    }
  return deal;
}

alignas(32) inline constexpr Deal kDeal = make_deal();

// table[i] in lane k of four; the others are arbitrary. Reads up to three entries before and behind it.
template <int k>
GAUGEKIT_AVX2 GAUGEKIT_INLINE __m128i entry_in_lane(const uint32_t* table, uint32_t i) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + i - k));
}

GAUGEKIT_AVX2 GAUGEKIT_INLINE __m128i look_up_four(const uint32_t* table, const uint32_t* i) {
  const __m128i low = _mm_blend_epi32(entry_in_lane<0>(table, i[0]), entry_in_lane<1>(table, i[1]), 2);
  const __m128i high = _mm_blend_epi32(entry_in_lane<2>(table, i[2]), entry_in_lane<3>(table, i[3]), 8);
  return _mm_blend_epi32(low, high, 12);
}

// Eight loads: the gather instruction takes several times as long on processors whose microcode keeps it from
// leaking data.
GAUGEKIT_AVX2 GAUGEKIT_INLINE __m256i look_up(const uint32_t* table, const uint32_t* i) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(look_up_four(table, i)), look_up_four(table, i + 4),
                                 1);
}

// Asks for memory that the groups to come read and write.
GAUGEKIT_INLINE void prefetch_streams(const uint8_t* a, const uint8_t* b, const uint8_t* plane,
                                      const uint8_t* out) {
  __builtin_prefetch(a + 512);
  __builtin_prefetch(b + 512);
  __builtin_prefetch(plane + 1024);
  __builtin_prefetch(out + 2048, 1);
  __builtin_prefetch(out + 2048 + 64, 1);
}

// What a group's share of the block before it adds to its checksum.
GAUGEKIT_AVX2 GAUGEKIT_INLINE void check_group(CrcLanes& crc, const uint8_t* p) {
  for (size_t i = 0; i < CrcLanes::kStep; i += 8)
    for (size_t k = 0; k < CrcLanes::kLanes; ++k)
      crc.lane[k] = _mm_crc32_u64(crc.lane[k], load<uint64_t>(p + k * CrcShift::kLane + i));
}

// A segment's 32 lanes. Where their slots are is stored as soon as it is known, a group before it is loaded.
struct Segment {
  __m256i x[4];
  alignas(32) uint32_t slot[kSegmentLanes];
};

GAUGEKIT_AVX2 GAUGEKIT_INLINE void store_slots(Segment& s, int i) {
  const __m256i slot = _mm256_and_si256(s.x[i], _mm256_set1_epi32(kSlots - 1));
  _mm256_store_si256(reinterpret_cast<__m256i*>(s.slot + 8 * i), slot);
}

// One step of every lane. The halves are apart, so that the processor's window holds work that does not wait
// for other work.
GAUGEKIT_AVX2 GAUGEKIT_INLINE void step(Segment& s, const uint32_t* slots, const uint8_t*& next,
                                        __m256i (&symbol)[4]) {
  __m256i y[4];
  for (int i = 0; i < 4; ++i) {
    symbol[i] = look_up(slots, s.slot + 8 * i);
    const __m256i high = _mm256_srli_epi32(s.x[i], kProbabilityBits);
    const __m256i rank = _mm256_and_si256(_mm256_srli_epi32(symbol[i], 8), _mm256_set1_epi32(kSlots - 1));
    y[i] = _mm256_mullo_epi32(_mm256_srli_epi32(symbol[i], 20), high);
    y[i] = _mm256_add_epi32(y[i], _mm256_add_epi32(high, rank));
  }
  for (int i = 0; i < 4; ++i) {
    const __m256i refill = _mm256_cmpgt_epi32(_mm256_set1_epi32(kStateLower), y[i]);
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(refill));
    const __m256i words =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(next)));
    const __m256i deal = _mm256_load_si256(reinterpret_cast<const __m256i*>(kDeal[mask].data()));
    next += 2 * size_t(__builtin_popcount(mask));
    const __m256i shift = _mm256_and_si256(refill, _mm256_set1_epi32(16));
    s.x[i] = _mm256_or_si256(_mm256_sllv_epi32(y[i], shift), _mm256_shuffle_epi8(words, deal));
    store_slots(s, i);
  }
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
      __m256i raw =
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + 16 * half)));
      if (output == Output::exponent16)
        raw = _mm256_mullo_epi16(raw, _mm256_set1_epi16(257));  // in both bytes
      const __m256i symbols = _mm256_slli_epi16(half ? second : first, symbol_place(output));
      const __m256i mask = _mm256_set1_epi16(short(0xFF << symbol_place(output)));
      _mm256_storeu_si256(to + half,
                          _mm256_or_si256(_mm256_and_si256(mask, symbols), _mm256_andnot_si256(mask, raw)));
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
  __m256i* states = reinterpret_cast<__m256i*>(d.states);
  Segment segment[kSegments];
  for (int i = 0; i < 8; ++i) {
    segment[i / 4].x[i % 4] = _mm256_load_si256(states + i);
    store_slots(segment[i / 4], i % 4);
  }
  const uint8_t *a = d.words[0].next, *b = d.words[1].next;
  const uint8_t *const a_safe = d.words[0].safe, *const b_safe = d.words[1].safe;
  constexpr int bytes = output_bytes(output);
  CrcLanes crc = d.crc;
  const uint8_t* check = d.check;
  int done = 0;
  for (; done < groups && a <= a_safe && b <= b_safe; ++done) {
    __m256i s[4], t[4];
    prefetch_streams(a, b, plane, out);
    step(segment[0], slots, a, s);
    if constexpr (output != Output::symbols) check_group(crc, check), check += CrcLanes::kStep;
    if constexpr (output != Output::exponent_and_two)
      put<output>(in_order(s[0], s[2]), in_order(s[1], s[3]), plane, out);
    step(segment[1], slots, b, t);
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
      put_with_six(in_order(t[0], t[2]), _mm_and_si128(c, low), shift, out + 64);
      put_with_six(in_order(t[1], t[3]), last, shift, out + 96);
    } else {
      put<output>(in_order(t[0], t[2]), in_order(t[1], t[3]), plane + kSegmentLanes,
                  out + kSegmentLanes * bytes);
    }
    plane += group_plane_bytes(output);
    out += kLanes * bytes;
  }
  for (int i = 0; i < 8; ++i) _mm256_store_si256(states + i, segment[i / 4].x[i % 4]);
  d.crc = crc;
  d.check = check;
  d.words[0].next = a;
  d.words[1].next = b;
  return done;
}

}  // namespace gaugekit::rans::avx2
#endif
