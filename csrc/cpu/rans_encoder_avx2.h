// The coder with 64 lanes in eight AVX2 registers.
#pragma once

#include <array>

#include "common/isa.h"
#include "rans_decoder_avx2.h"
#include "rans_encoder_table.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::avx2 {

// collect[mask]: the lanes of the mask in their order, in the last places of eight.
using Collect = std::array<std::array<uint8_t, 8>, 256>;

constexpr Collect make_collect() {
  Collect collect{};
  for (int mask = 0; mask < 256; ++mask)
    for (int lane = 7, place = 7; lane >= 0; --lane)
      if (mask >> lane & 1) collect[mask][place--] = uint8_t(lane);
  return collect;
}

inline constexpr Collect kCollect = make_collect();

// One step of eight lanes, in two halves.
struct Step {
  __m256i quotient;
  alignas(32) uint32_t place[8];
};

// `symbols`: every second byte. Eight words are stored before `next`, of which the last ones count; the
// others are written over later, or lie in front of the buffer.
GAUGEKIT_AVX2 GAUGEKIT_INLINE void divide(__m256i x, const uint8_t* symbols, const EncoderTable& t,
                                          Step& step, uint16_t*& next) {
  uint32_t index[8];
  for (int i = 0; i < 8; ++i) index[i] = symbols[2 * i];
  const __m256i code = look_up(t.by_symbol, index);
  const __m256i f = _mm256_and_si256(code, _mm256_set1_epi32(0xFFFF)), one = _mm256_set1_epi32(1);
  const __m256i spill = _mm256_cmpgt_epi32(x, _mm256_sub_epi32(_mm256_slli_epi32(f, 19), one));
  const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(spill));
  const __m256i order =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCollect[mask].data())));
  const __m256i words = _mm256_and_si256(_mm256_permutevar8x32_epi32(x, order), _mm256_set1_epi32(0xFFFF));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(next - 8),
                   _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  next -= __builtin_popcount(mask);
  x = _mm256_srlv_epi32(x, _mm256_and_si256(spill, _mm256_set1_epi32(16)));
  // x < 2^31 and the quotient is below 2^19, so that of floats is right or off by one.
  __m256i quotient = _mm256_cvttps_epi32(_mm256_div_ps(_mm256_cvtepi32_ps(x), _mm256_cvtepi32_ps(f)));
  __m256i rest = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, f));
  const __m256i less = _mm256_srai_epi32(rest, 31);
  quotient = _mm256_add_epi32(quotient, less);
  rest = _mm256_add_epi32(rest, _mm256_and_si256(less, f));
  const __m256i more = _mm256_cmpgt_epi32(rest, _mm256_sub_epi32(f, one));
  step.quotient = _mm256_slli_epi32(_mm256_sub_epi32(quotient, more), kProbabilityBits);
  rest = _mm256_sub_epi32(rest, _mm256_and_si256(more, f));
  _mm256_store_si256(reinterpret_cast<__m256i*>(step.place),
                     _mm256_add_epi32(rest, _mm256_srli_epi32(code, 16)));
}

// Codes `groups` whole groups, the last first.
GAUGEKIT_AVX2 inline void encode_groups(const Coder& coder, uint64_t groups) {
  const auto& [symbols, table, states, words, ahead] = coder;
  const EncoderTable& t = *table;
  __m256i* memory = reinterpret_cast<__m256i*>(states);
  __m256i x[8];
  for (int i = 0; i < 8; ++i) x[i] = _mm256_loadu_si256(memory + i);
  uint16_t *a = words[0], *b = words[1];
  for (uint64_t g = groups; g--;) {
    const uint8_t* first = symbols + g * kLanes;
    Step steps[8];
    // The lanes of odd elements, then those of even ones, each from the top; the halves are apart so that
    // more than one vector's chain fits the processor's window.
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) {
      const uint8_t* from = first + (i & 1) * 16 + i / 2;
      divide(x[i], from, t, steps[i], a);
      divide(x[4 + i], from + kSegmentLanes, t, steps[4 + i], b);
    }
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i)
      x[i] = _mm256_or_si256(steps[i].quotient, look_up(t.slot_of, steps[i].place));
    ahead.ask(g);
  }
  for (int i = 0; i < 8; ++i) _mm256_storeu_si256(memory + i, x[i]);
  words[0] = a;
  words[1] = b;
}

// Adds to counts[s] how often each s of `windows` * kWindow consecutive symbols from `low` on occurs among
// `n`, a multiple of 64 and at most 2^12: a comparison and a subtraction for a vector of them. The others are
// counted one by one; returns how many these are.
GAUGEKIT_AVX2 inline uint64_t count_range(const uint8_t* symbols, uint64_t n, int low, int windows,
                                          uint32_t* counts) {
  const auto at = [symbols](uint64_t i) GAUGEKIT_AVX2 {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(symbols + i));
  };
  for (int first = low; first < low + windows * kWindow; first += kWindow) {
    __m256i symbol[kWindow], count[kWindow];
    for (int k = 0; k < kWindow; ++k) symbol[k] = _mm256_set1_epi8(char(first + k)), count[k] = __m256i{};
    for (uint64_t i = 0; i < n; i += 32)
      for (int k = 0; k < kWindow; ++k)
        count[k] = _mm256_sub_epi8(count[k], _mm256_cmpeq_epi8(at(i), symbol[k]));
    for (int k = 0; k < kWindow; ++k) {
      alignas(32) uint64_t sums[4];
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums), _mm256_sad_epu8(count[k], __m256i{}));
      for (uint64_t sum : sums) counts[first + k] += uint32_t(sum);
    }
  }
  uint64_t others = 0;
  const __m256i lowest = _mm256_set1_epi8(char(low)), end = _mm256_set1_epi8(char(windows * kWindow));
  for (uint64_t i = 0; i < n; i += 32) {
    const __m256i place = _mm256_sub_epi8(at(i), lowest);
    uint32_t outside = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(place, end), place)));
    for (; outside; outside &= outside - 1, ++others) ++counts[symbols[i + __builtin_ctz(outside)]];
  }
  return others;
}

}  // namespace gaugekit::rans::avx2
#endif
