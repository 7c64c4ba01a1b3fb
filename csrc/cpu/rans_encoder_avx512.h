// The coder with 64 lanes in four AVX-512 registers, and a histogram of few symbols.
#pragma once

#include "common/isa.h"
#include "rans_decoder_avx512.h"
#include "rans_encoder_table.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::avx512 {

// What 16 symbols need: start << 16 | frequency.
template <bool in_registers>
GAUGEKIT_AVX512 GAUGEKIT_INLINE __m512i codes_of(__m512i index, const __m512i (&table)[2],
                                                 const uint32_t* memory) {
  if constexpr (in_registers) return _mm512_permutex2var_epi32(table[0], index, table[1]);
  index = _mm512_and_si512(index, _mm512_set1_epi32(255));
  return look_up(memory, index);
}

// One step of 16 lanes. The quotient is that of floats rounded towards zero: x < 2^31 and it is below 2^19,
// so it is right or one too small.
struct Step {
  __m512i quotient, place;
};

GAUGEKIT_AVX512 GAUGEKIT_INLINE Step encode_step(__m512i x, __m512i code, uint16_t*& next) {
  constexpr int kTruncate = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  const __mmask16 spill = _mm512_cmpge_epu32_mask(x, _mm512_maskz_slli_epi32(kAll16, code, 19));
  const int spilled = __builtin_popcount(spill);
  next -= spilled;
  _mm256_mask_storeu_epi16(next, __mmask16((1u << spilled) - 1),
                           _mm512_maskz_cvtepi32_epi16(kAll16, _mm512_maskz_compress_epi32(spill, x)));
  x = _mm512_mask_srli_epi32(x, spill, x, 16);
  const __m512i f = _mm512_and_si512(code, _mm512_set1_epi32(0xFFFF));
  __m512i quotient = _mm512_maskz_cvttps_epi32(
      kAll16, _mm512_maskz_div_round_ps(kAll16, _mm512_maskz_cvt_roundepi32_ps(kAll16, x, kTruncate),
                                        _mm512_maskz_cvtepi32_ps(kAll16, f), kTruncate));
  __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, f));
  const __mmask16 more = _mm512_cmpge_epu32_mask(rest, f);
  quotient = _mm512_mask_sub_epi32(quotient, more, quotient, _mm512_set1_epi32(-1));
  rest = _mm512_mask_sub_epi32(rest, more, rest, f);
  const __m512i place = _mm512_add_epi32(rest, _mm512_maskz_srli_epi32(kAll16, code, 16));
  return {_mm512_maskz_slli_epi32(kAll16, quotient, kProbabilityBits), place};
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
template <bool in_registers>
GAUGEKIT_AVX512 void encode_groups(const uint8_t* symbols, uint64_t groups, const EncoderTable& t,
                                   uint32_t* states, uint16_t** words) {
  IndexRows rows;
  if (in_registers) fill_rows(t.table, rows);
  const __m512i table[2] = {_mm512_loadu_si512(t.by_index), _mm512_loadu_si512(t.by_index + 16)};
  __m512i x0 = _mm512_loadu_si512(states), x1 = _mm512_loadu_si512(states + 16);
  __m512i x2 = _mm512_loadu_si512(states + 32), x3 = _mm512_loadu_si512(states + 48);
  uint16_t *a = words[0], *b = words[1];
  for (uint64_t g = groups; g--;) {
    __m512i index = _mm512_loadu_si512(symbols + g * kLanes);
    if (in_registers) index = indices(index, rows);
    // 32 bits a lane: the even element's index, and above it the odd one's
    const __m512i first =
        _mm512_maskz_cvtepu16_epi32(kAll16, _mm512_maskz_extracti64x4_epi64(kAll8, index, 0));
    const __m512i second =
        _mm512_maskz_cvtepu16_epi32(kAll16, _mm512_maskz_extracti64x4_epi64(kAll8, index, 1));
    const uint32_t* memory = t.by_symbol;
    // Arithmetic of all four before the loads: more than one vector's chain then fits the processor's window.
    const Step s1 =
        encode_step(x1, codes_of<in_registers>(_mm512_maskz_srli_epi32(kAll16, first, 8), table, memory), a);
    const Step s3 =
        encode_step(x3, codes_of<in_registers>(_mm512_maskz_srli_epi32(kAll16, second, 8), table, memory), b);
    const Step s0 = encode_step(x0, codes_of<in_registers>(first, table, memory), a);
    const Step s2 = encode_step(x2, codes_of<in_registers>(second, table, memory), b);
    x1 = _mm512_or_si512(s1.quotient, look_up(t.slot_of, s1.place));
    x3 = _mm512_or_si512(s3.quotient, look_up(t.slot_of, s3.place));
    x0 = _mm512_or_si512(s0.quotient, look_up(t.slot_of, s0.place));
    x2 = _mm512_or_si512(s2.quotient, look_up(t.slot_of, s2.place));
  }
  _mm512_storeu_si512(states, x0);
  _mm512_storeu_si512(states + 16, x1);
  _mm512_storeu_si512(states + 32, x2);
  _mm512_storeu_si512(states + 48, x3);
  words[0] = a;
  words[1] = b;
}

// How often each of the `size` symbols occurs among `n`, a multiple of 64; returns how many that are in all.
GAUGEKIT_AVX512 inline uint64_t count_known(const uint8_t* symbols, uint64_t n, const uint8_t* known,
                                            int size, uint32_t* counts) {
  uint64_t all = 0;
  for (int i = 0; i < size; ++i) {
    const __m512i symbol = _mm512_set1_epi8(char(known[i]));
    uint64_t count = 0;
    for (uint64_t at = 0; at < n; at += 64)
      count +=
          uint64_t(__builtin_popcountll(_mm512_cmpeq_epi8_mask(_mm512_loadu_si512(symbols + at), symbol)));
    counts[i] = uint32_t(count);
    all += count;
  }
  return all;
}

}  // namespace gaugekit::rans::avx512
#endif
