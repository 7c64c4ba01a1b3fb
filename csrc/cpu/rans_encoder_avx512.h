// The coder with 64 lanes in four AVX-512 registers, and a histogram of few symbols.
#pragma once

#include "common/isa.h"
#include "rans_decoder_avx512.h"
#include "rans_encoder_table.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::avx512 {

// What coding 16 lanes needs from the table, held in registers if there are cells with at most
// `breaks` (0: there are none).
template <int breaks>
struct Codes {
  __m512i code[2], at[breaks][2];
  __m512 reciprocal[2];
};
template <>
struct Codes<0> {};  // what is needed is looked up in memory

constexpr int kTruncate = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;

// Of the frequency in a code, rounded towards zero.
GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512 reciprocal_of(__m512i code) {
  const __m512i f = _mm512_and_si512(code, _mm512_set1_epi32(0xFFFF));
  return _mm512_maskz_div_round_ps(kAll16, _mm512_set1_ps(1), _mm512_maskz_cvtepi32_ps(kAll16, f), kTruncate);
}

template <int breaks>
GAUGEKIT_AVX512 GAUGEKIT_INLINE Codes<breaks> load_codes(const EncoderCells& cells) {
  Codes<breaks> codes;
  for (int half = 0; half < 2; ++half) {
    codes.code[half] = _mm512_loadu_si512(cells.code + 16 * half);
    codes.reciprocal[half] = reciprocal_of(codes.code[half]);
    for (int k = 0; k < breaks; ++k) codes.at[k][half] = _mm512_loadu_si512(cells.at[k] + 16 * half);
  }
  return codes;
}

// One step of 16 lanes, in two halves. The quotient is that of floats rounded towards zero: x < 2^31 and it
// is below 2^19, so the three roundings take less than 3 * 2^-23 of it and it is right or one too small.
struct Step {
  __m512i quotient, place;
  __mmask16 mapped;
};

template <int breaks>
GAUGEKIT_AVX512 GAUGEKIT_INLINE Step divide(__m512i x, __m512i index, const Codes<breaks>& codes,
                                            const EncoderTable& t, uint16_t*& next) {
  __m512i code;
  __m512 reciprocal;
  if constexpr (breaks) {
    code = lookup(codes.code, index);
    reciprocal = _mm512_permutex2var_ps(codes.reciprocal[0], index, codes.reciprocal[1]);
  } else {
    code = look_up(t.by_symbol, _mm512_and_si512(index, _mm512_set1_epi32(255)));
    reciprocal = reciprocal_of(code);
  }
  const __mmask16 spill = _mm512_cmpge_epu32_mask(x, _mm512_maskz_slli_epi32(kAll16, code, 19));
  const int spilled = __builtin_popcount(spill);
  next -= spilled;
  _mm256_mask_storeu_epi16(next, __mmask16((1u << spilled) - 1),
                           _mm512_maskz_cvtepi32_epi16(kAll16, _mm512_maskz_compress_epi32(spill, x)));
  x = _mm512_mask_srli_epi32(x, spill, x, 16);
  const __m512i f = _mm512_and_si512(code, _mm512_set1_epi32(0xFFFF));
  __m512i quotient = _mm512_maskz_cvttps_epi32(
      kAll16, _mm512_maskz_mul_round_ps(kAll16, _mm512_maskz_cvt_roundepi32_ps(kAll16, x, kTruncate),
                                        reciprocal, kTruncate));
  __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, f));
  const __mmask16 more = _mm512_cmpge_epu32_mask(rest, f);
  quotient = _mm512_mask_sub_epi32(quotient, more, quotient, _mm512_set1_epi32(-1));
  rest = _mm512_mask_sub_epi32(rest, more, rest, f);
  const __m512i place = _mm512_add_epi32(rest, _mm512_maskz_srli_epi32(kAll16, code, 16));
  return {_mm512_maskz_slli_epi32(kAll16, quotient, kProbabilityBits), place, _mm512_movepi32_mask(code)};
}

// The state after the step, from the slots in memory or, if there are cells, from them.
template <int breaks>
GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i finish(const Step& s, const Codes<breaks>& codes,
                                               const uint32_t* slot_of) {
  if constexpr (breaks == 0) {
    return _mm512_or_si512(s.quotient, look_up(slot_of, s.place));
  } else {
    const __m512i cell = _mm512_maskz_srli_epi32(kAll16, s.place, 7);  // the lookup takes the low five bits
    const __m512i place = _mm512_maskz_slli_epi32(kAll16, s.place, 25);
    __m512i number = lookup(codes.at[0], cell);
    const __mmask16 behind = _mm512_cmpgt_epu32_mask(place, number);
    number = _mm512_mask_srli_epi32(number, behind, number, 12);
    for (int k = 1; k < breaks; ++k) {
      const __m512i next = lookup(codes.at[k], cell);
      number = _mm512_mask_mov_epi32(number, _mm512_cmpgt_epu32_mask(place, next), next);
    }
    const __m512i slot = _mm512_mask_add_epi32(s.place, s.mapped, s.place, number);
    return _mm512_ternarylogic_epi32(s.quotient, slot, _mm512_set1_epi32(kSlots - 1), 0xF8);  // a | (b & c)
  }
}

// Symbols to their indices in the table, for tables of at most 32: a 16-byte lookup for each row of 16
// symbols in which one occurs.
struct IndexRows {
  int count = 0;
  __m512i row[16], index[16];
};

GAUGEKIT_AVX512 GAUGEKIT_INLINE void fill_rows(const Table& table, IndexRows& rows) {
  alignas(16) uint8_t index[16][16] = {};
  bool used[16] = {};
  for (int i = 0; i < table.size; ++i) {
    index[table.symbol[i] >> 4][table.symbol[i] & 15] = uint8_t(i);
    used[table.symbol[i] >> 4] = true;
  }
  for (int row = 0; row < 16; ++row) {
    if (!used[row]) continue;
    rows.row[rows.count] = _mm512_set1_epi8(char(row << 4));
    rows.index[rows.count++] =
        _mm512_maskz_broadcast_i32x4(kAll16, _mm_load_si128(reinterpret_cast<const __m128i*>(index[row])));
  }
}

GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i indices(__m512i symbols, const IndexRows& rows) {
  __m512i result = _mm512_setzero_si512();
  for (int i = 0; i < rows.count; ++i) {
    // 0x70 to 0x7F within the row, above 0x7F outside, where the shuffle gives zero
    const __m512i place = _mm512_adds_epu8(_mm512_xor_si512(symbols, rows.row[i]), _mm512_set1_epi8(0x70));
    result = _mm512_or_si512(result, _mm512_shuffle_epi8(rows.index[i], place));
  }
  return result;
}

// Codes `groups` whole groups, the last first.
template <int breaks>
GAUGEKIT_AVX512 void encode_groups(const Coder& coder, uint64_t groups) {
  const auto& [symbols, table, states, words, ahead] = coder;
  const EncoderTable& t = *table;
  IndexRows rows;
  Codes<breaks> codes;
  if constexpr (breaks) fill_rows(t.table, rows), codes = load_codes<breaks>(t.cells);
  __m512i x0 = _mm512_loadu_si512(states), x1 = _mm512_loadu_si512(states + 16);
  __m512i x2 = _mm512_loadu_si512(states + 32), x3 = _mm512_loadu_si512(states + 48);
  uint16_t *a = words[0], *b = words[1];
  for (uint64_t g = groups; g--;) {
    __m512i index = _mm512_loadu_si512(symbols + g * kLanes);
    if constexpr (breaks) index = indices(index, rows);
    // 32 bits a lane: the even element's index, and above it the odd one's
    const __m512i even0 =
        _mm512_maskz_cvtepu16_epi32(kAll16, _mm512_maskz_extracti64x4_epi64(kAll8, index, 0));
    const __m512i even2 =
        _mm512_maskz_cvtepu16_epi32(kAll16, _mm512_maskz_extracti64x4_epi64(kAll8, index, 1));
    const __m512i odd1 = _mm512_maskz_srli_epi32(kAll16, even0, 8);
    const __m512i odd3 = _mm512_maskz_srli_epi32(kAll16, even2, 8);
    // The halves are apart so that more than one vector's chain fits the processor's window.
    const Step s1 = divide(x1, odd1, codes, t, a), s3 = divide(x3, odd3, codes, t, b);
    const Step s0 = divide(x0, even0, codes, t, a), s2 = divide(x2, even2, codes, t, b);
    x1 = finish(s1, codes, t.slot_of), x3 = finish(s3, codes, t.slot_of);
    x0 = finish(s0, codes, t.slot_of), x2 = finish(s2, codes, t.slot_of);
    ahead.ask(g);
  }
  _mm512_storeu_si512(states, x0);
  _mm512_storeu_si512(states + 16, x1);
  _mm512_storeu_si512(states + 32, x2);
  _mm512_storeu_si512(states + 48, x3);
  words[0] = a;
  words[1] = b;
}

// As avx2::count_range.
GAUGEKIT_AVX512 inline uint64_t count_range(const uint8_t* symbols, uint64_t n, int low, int windows,
                                            uint32_t* counts) {
  for (int first = low; first < low + windows * kWindow; first += kWindow) {
    __m512i symbol[kWindow], count[kWindow];
    for (int k = 0; k < kWindow; ++k) symbol[k] = _mm512_set1_epi8(char(first + k)), count[k] = __m512i{};
    for (uint64_t at = 0; at < n; at += 64) {
      const __m512i found = _mm512_loadu_si512(symbols + at);
      for (int k = 0; k < kWindow; ++k)
        count[k] = _mm512_mask_sub_epi8(count[k], _mm512_cmpeq_epi8_mask(found, symbol[k]), count[k],
                                        _mm512_set1_epi8(-1));
    }
    for (int k = 0; k < kWindow; ++k) {
      alignas(64) uint64_t sums[8];
      _mm512_store_si512(sums, _mm512_sad_epu8(count[k], __m512i{}));
      for (uint64_t sum : sums) counts[first + k] += uint32_t(sum);
    }
  }
  uint64_t others = 0;
  const __m512i lowest = _mm512_set1_epi8(char(low)), last = _mm512_set1_epi8(char(windows * kWindow - 1));
  for (uint64_t at = 0; at < n; at += 64) {
    uint64_t outside =
        _mm512_cmpgt_epu8_mask(_mm512_sub_epi8(_mm512_loadu_si512(symbols + at), lowest), last);
    for (; outside; outside &= outside - 1, ++others) ++counts[symbols[at + __builtin_ctzll(outside)]];
  }
  return others;
}

}  // namespace gaugekit::rans::avx512
#endif
