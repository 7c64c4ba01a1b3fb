// A histogram of at most 32 consecutive symbols, bit by bit (AVX512-VBMI): a lookup turns each of eight
// symbols into a bit of its own, and the bits of 16 vectors are added up by logic before they are counted.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "rans_decoder_vbmi2.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>

namespace gaugekit::rans::vbmi2 {

constexpr int kBits = 8, kVectors = 16;
constexpr uint64_t kCounted = 64 * kVectors;  // symbols that are counted together

// The two bits of a + b + c, each in the place of a bit; c becomes the lower one, the upper one is returned.
GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i add_bits(__m512i a, __m512i b, __m512i& c) {
  const __m512i carry = _mm512_ternarylogic_epi32(a, b, c, 0xE8);
  c = _mm512_ternarylogic_epi32(a, b, c, 0x96);
  return carry;
}

// sums[i]: what 2^i vectors leave over. Adds 2^level vectors, and returns those that fill the next
// sum.
template <int level>
GAUGEKIT_VBMI2 GAUGEKIT_INLINE __m512i add_vectors(const uint8_t* symbols, __m512i bits, __m512i* sums) {
  if constexpr (level == 0) {
    return _mm512_maskz_permutexvar_epi8(kAll64, _mm512_loadu_si512(symbols), bits);
  } else {
    const __m512i a = add_vectors<level - 1>(symbols, bits, sums);
    const __m512i b = add_vectors<level - 1>(symbols + (32 << level), bits, sums);
    return add_bits(a, b, sums[level - 1]);
  }
}

// Adds to lanes[k], spread over it, how often symbol low + k occurs among `n`, a multiple of kCounted and at
// most 2^12, k < windows * kBits. The others are counted one by one, in counts; returns how many these are.
GAUGEKIT_VBMI2 inline uint64_t count_range(const uint8_t* symbols, uint64_t n, int low, int windows,
                                           uint32_t* counts, uint64_t (*lanes)[8]) {
  constexpr int kLevels = 4;  // 2^4 vectors
  static_assert(kVectors == 1 << kLevels);
  for (int first = 0; first < windows * kBits; first += kBits) {
    alignas(64) uint8_t bit_of[64] = {};  // by the symbol's low six bits
    for (int b = 0; b < kBits; ++b) bit_of[(low + first + b) % 64] = uint8_t(1 << b);
    const __m512i bits = _mm512_load_si512(bit_of);
    __m512i sums[kLevels] = {}, count[kBits] = {};
    const auto add = [&](__m512i vector, int each) GAUGEKIT_VBMI2 {
      for (int b = 0; b < kBits; ++b)
        count[b] =
            _mm512_mask_add_epi8(count[b], _mm512_test_epi8_mask(vector, _mm512_set1_epi8(char(1 << b))),
                                 count[b], _mm512_set1_epi8(char(each)));
    };
    for (uint64_t at = 0; at < n; at += kCounted)
      add(add_vectors<kLevels>(symbols + at, bits, sums), kVectors);
    for (int level = 0; level < kLevels; ++level) add(sums[level], 1 << level);
    for (int b = 0; b < kBits; ++b) {
      uint64_t* to = lanes[first + b];
      _mm512_store_si512(to, _mm512_add_epi64(_mm512_load_si512(to), _mm512_sad_epu8(count[b], __m512i{})));
    }
  }
  const __m512i lowest = _mm512_set1_epi8(char(low));
  __m512i most = __m512i{};
  for (uint64_t at = 0; at < n; at += 64)
    most = _mm512_max_epu8(most, _mm512_sub_epi8(_mm512_loadu_si512(symbols + at), lowest));
  const __m512i last = _mm512_set1_epi8(char(windows * kBits - 1));
  if (!_mm512_cmpgt_epu8_mask(most, last)) return 0;
  uint64_t others = 0;
  for (uint64_t at = 0; at < n; at += 64) {
    uint64_t outside =
        _mm512_cmpgt_epu8_mask(_mm512_sub_epi8(_mm512_loadu_si512(symbols + at), lowest), last);
    for (; outside; outside &= outside - 1, ++others) {
      const uint8_t symbol = symbols[at + __builtin_ctzll(outside)];
      ++counts[symbol];
      const int k = (symbol - low) & 63;  // it was counted as symbol low + k
      if (k < windows * kBits) --lanes[k][0];
    }
  }
  return others;
}

}  // namespace gaugekit::rans::vbmi2
#endif
