// Decoding of packed weights (docs/resident.md). Free of torch.
//
// A segment (16 blocks of 64 weights of one row) is decoded in two steps. The first makes one byte a weight,
// the part of the 16-bit word that the planes hold: bfloat16's exponent, float16's whole high byte. The few
// escaped exponents are patched into these bytes one by one. The second step joins them with the raw bytes,
// in registers, into the words.
#pragma once

#include "packed_linear_neon.h"
#include "packed_linear_segment.h"

#ifdef GAUGEKIT_X86
// GCC 12 takes the undefined operands inside its own intrinsics for uninitialised variables.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace gaugekit::packed {

// --- step one: bytes of a segment, [blocks * BLOCK + SLACK]
// --------------------------------------------------------
template <bool HALF, int C>
void bytes_portable(const Segment& s, uint8_t* bytes) {
  const uint8_t* next = s.escapes;
  for (int64_t b = 0; b < s.blocks; ++b) {
    uint8_t* to = bytes + b * BLOCK;
    std::memset(to, HALF ? s.window << 2 : s.window, BLOCK);
    for (int p = 0; p < planes_of<HALF, C>; ++p) {
      const uint64_t plane = s.planes[p * s.stride + b];
      for (int i = 0; i < BLOCK; ++i)
        to[i] = static_cast<uint8_t>(to[i] + (plane >> i & 1) * plane_value<HALF, C>(p));
    }
    for (uint64_t mask = escaped<C>(s, b); mask; mask &= mask - 1) {
      const uint8_t patch = *next++;
      to[__builtin_ctzll(mask)] ^= static_cast<uint8_t>(HALF ? patch << 2 : patch);
    }
  }
}

#ifdef GAUGEKIT_X86
// Patches the block at `to`, whose escaped weights are `mask`; returns where the next block's escapes begin.
// A block rarely has more than four. Where it has fewer, the place is the first byte after the block, which
// the next block writes over. bfloat16's byte is the exponent alone, so it is written without being read
// first.
template <bool HALF, int C>
__attribute__((target("bmi,popcnt"), always_inline)) inline const uint8_t* patch(uint8_t* to, uint64_t mask,
                                                                                 const uint8_t* next,
                                                                                 uint8_t window) {
  const auto place = [to, next, outer = static_cast<uint8_t>(window + (1 << C) - 1)](uint64_t i, int n) {
    to[i] = static_cast<uint8_t>(HALF ? to[i] ^ next[n] << 2 : next[n] ^ outer);
  };
  const int64_t count = _mm_popcnt_u64(mask);
  for (int i = 0; i < 4; ++i, mask = _blsr_u64(mask)) place(_tzcnt_u64(mask), i);
  for (int i = 4; mask; ++i, mask = _blsr_u64(mask)) place(_tzcnt_u64(mask), i);
  return next + count;
}

template <bool HALF, int C>
GAUGEKIT_AVX2 void bytes_avx2(const Segment& s, uint8_t* bytes) {
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2,
                                          2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const __m256i base = _mm256_set1_epi8(static_cast<char>(HALF ? s.window << 2 : s.window));
  const uint8_t* next = s.escapes;
  for (int64_t b = 0; b < s.blocks; ++b) {
    __m256i part[2] = {base, base};
    for (int p = 0; p < planes_of<HALF, C>; ++p) {
      const uint64_t plane = s.planes[p * s.stride + b];
      const __m256i value = _mm256_set1_epi8(static_cast<char>(plane_value<HALF, C>(p)));
      for (int h = 0; h < 2; ++h) {
        const __m256i held =
            _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(plane >> 32 * h)), spread);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(held, bit), bit);
        part[h] = _mm256_add_epi8(part[h], _mm256_and_si256(set, value));
      }
    }
    uint8_t* to = bytes + b * BLOCK;
    for (int h = 0; h < 2; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * h), part[h]);
    next = patch<HALF, C>(to, escaped<C>(s, b), next, s.window);
  }
}

template <bool HALF, int C>
__attribute__((target("avx512f,avx512bw"), always_inline)) inline __m512i bytes_of_planes(const Segment& s,
                                                                                          int64_t b) {
  const int base = HALF ? s.window << 2 : s.window;
  __m512i v = _mm512_mask_blend_epi8(s.planes[b], _mm512_set1_epi8(static_cast<char>(base)),
                                     _mm512_set1_epi8(static_cast<char>(base + plane_value<HALF, C>(0))));
  for (int p = 1; p < planes_of<HALF, C>; ++p)
    v = _mm512_mask_add_epi8(v, s.planes[p * s.stride + b], v,
                             _mm512_set1_epi8(static_cast<char>(plane_value<HALF, C>(p))));
  return v;
}

// The bytes of a block in a register; `next`, where its escapes begin, moves on to the next block's. A block
// rarely has more than four escapes, so that many are put in their places without a branch: each is a mask of
// one bit, and of none where the block has fewer.
template <bool HALF, int C>
__attribute__((target("avx512f,avx512bw,bmi,popcnt"), always_inline)) inline __m512i block_avx512(
    const Segment& s, int64_t b, const uint8_t*& next) {
  uint64_t mask = escaped<C>(s, b);
  const uint8_t* from = next;
  next += _mm_popcnt_u64(mask);
  __m512i patches = _mm512_setzero_si512();
  const auto place = [&patches, &mask, from](int i) __attribute__((target("avx512f,avx512bw,bmi"))) {
    const __m128i found = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    patches = _mm512_mask_broadcastb_epi8(patches, _blsi_u64(mask), found);
    mask = _blsr_u64(mask);
  };
  for (int i = 0; i < 4; ++i) place(i);
  for (int i = 4; __builtin_expect(mask != 0, 0); ++i) place(i);
  if (HALF) patches = _mm512_slli_epi16(patches, 2);  // five bits a byte: nothing crosses into the next
  return _mm512_xor_si512(bytes_of_planes<HALF, C>(s, b), patches);
}

template <bool HALF, int C>
GAUGEKIT_AVX512 void bytes_avx512(const Segment& s, uint8_t* bytes) {
  const uint8_t* next = s.escapes;
  for (int64_t b = 0; b < s.blocks; ++b)
    _mm512_storeu_si512(bytes + b * BLOCK, block_avx512<HALF, C>(s, b, next));
}

#define GAUGEKIT_BLOCK_VBMI2 \
  __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,gfni,popcnt"), always_inline)) inline

// Where `codes` finds byte j of plane p for quadword j, in two registers of two planes each.
template <int C>
struct alignas(64) PlaneBytes {
  uint8_t at[64];
};
template <int C>
constexpr PlaneBytes<C> plane_bytes() {
  PlaneBytes<C> places{};
  for (int j = 0; j < 8; ++j)
    for (int p = 0; p < C; ++p)
      places.at[8 * j + 7 - p] = static_cast<uint8_t>(64 * (p / 2) + 8 * (p % 2) + j);
  return places;
}
template <int C>
inline constexpr PlaneBytes<C> PLANE_BYTES = plane_bytes<C>();

// The codes of a block of bfloat16: bit i of plane p becomes bit p of byte i. As masks the planes would have
// to pass from general registers one by one, which takes as long as all the rest; a quadword of eight bytes,
// one of each plane, is a matrix of bits, and multiplied with the unit vectors it is transposed.
template <int C>
GAUGEKIT_BLOCK_VBMI2 __m512i codes(const Segment& s, int64_t b) {
  const auto two = [&s, b](int p) __attribute__((target("avx512f"))) {
    const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(s.planes + p * s.stride + b));
    if (p + 1 == C) return _mm512_castsi128_si512(first);
    const double* second = reinterpret_cast<const double*>(s.planes + (p + 1) * s.stride + b);
    return _mm512_castsi128_si512(_mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(first), second)));
  };
  constexpr uint64_t used = 0x0101010101010101ull * (0xff & 0xff << (8 - C));
  const __m512i matrices =
      _mm512_maskz_permutex2var_epi8(used, two(0), _mm512_load_si512(PLANE_BYTES<C>.at), two(2));
  const __m512i units = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201ull));
  return _mm512_gf2p8affine_epi64_epi8(units, matrices, 0);
}

// As block_avx512, all of a block's escapes put in their places by one instruction.
template <bool HALF, int C>
GAUGEKIT_BLOCK_VBMI2 __m512i block_vbmi2(const Segment& s, int64_t b, const uint8_t*& next) {
  const uint64_t mask = escaped<C>(s, b);
  const __m512i found = _mm512_loadu_si512(next);
  next += _mm_popcnt_u64(mask);
  if (HALF) {
    const __m512i patches = _mm512_slli_epi16(_mm512_maskz_expand_epi8(mask, found), 2);
    return _mm512_xor_si512(bytes_of_planes<true, C>(s, b), patches);
  }
  const __m512i code = codes<C>(s, b);
  const __mmask64 outside = _mm512_cmpeq_epi8_mask(code, _mm512_set1_epi8((1 << C) - 1));
  const __m512i bytes = _mm512_add_epi8(code, _mm512_set1_epi8(static_cast<char>(s.window)));
  return _mm512_xor_si512(bytes, _mm512_maskz_expand_epi8(outside, found));
}

template <bool HALF, int C>
GAUGEKIT_VBMI2 void bytes_vbmi2(const Segment& s, uint8_t* bytes) {
  const uint8_t* next = s.escapes;
  for (int64_t b = 0; b < s.blocks; ++b)
    _mm512_storeu_si512(bytes + b * BLOCK, block_vbmi2<HALF, C>(s, b, next));
}
#endif

template <bool HALF, int C>
void bytes_of(const Segment& s, uint8_t* bytes, Isa l) {
#ifdef GAUGEKIT_X86
  if (l >= Isa::vbmi2) return bytes_vbmi2<HALF, C>(s, bytes);
  if (l == Isa::avx512) return bytes_avx512<HALF, C>(s, bytes);
  if (l == Isa::avx2) return bytes_avx2<HALF, C>(s, bytes);
#endif
#ifdef GAUGEKIT_ARM
  if (l >= Isa::neon) return bytes_neon<HALF, C>(s, bytes);
#endif
  bytes_portable<HALF, C>(s, bytes);
}

inline void bytes_of(const Weight& w, const Segment& s, uint8_t* bytes, Isa l) {
  if (w.half()) return w.code_bits() == 3 ? bytes_of<true, 3>(s, bytes, l) : bytes_of<true, 4>(s, bytes, l);
  return w.code_bits() == 3 ? bytes_of<false, 3>(s, bytes, l) : bytes_of<false, 4>(s, bytes, l);
}

// --- step two: words
// ------------------------------------------------------------------------------------------------
#ifdef GAUGEKIT_X86
// The words of 64 weights in two registers, each 128-bit lane q holding weights 16q + 0..7 (lo) and 16q
// + 8..15 (hi).
template <bool HALF>
__attribute__((target("avx512f,avx512bw"), always_inline)) inline void words_of(__m512i raw, __m512i byte,
                                                                                __m512i& lo, __m512i& hi) {
  if (!HALF) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    // The destructive operand is one that is used once; 0xe4 is (third ? first : second), 0xd8 the opposite.
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_slli_epi16(byte, 7), raw, sign, 0xe4);
    byte = _mm512_ternarylogic_epi32(_mm512_srli_epi16(byte, 1), raw, sign, 0xd8);
    raw = low;
  }
  lo = _mm512_unpacklo_epi8(raw, byte);
  hi = _mm512_unpackhi_epi8(raw, byte);
}

// What the magnitudes of E5M2 numbers, seven bits, are as bfloat16 numbers, all of them exactly: high and low
// bytes.
struct WidenedE5M2 {
  alignas(64) uint8_t high[128], low[128];
};
constexpr WidenedE5M2 widened_e5m2() {
  WidenedE5M2 table{};
  for (int magnitude = 0; magnitude < 128; ++magnitude) {
    const int exponent = magnitude >> 2;
    constexpr int tiny[] = {0, 111 << 7, 112 << 7, 112 << 7 | 1 << 6};  // 0, 1, 2 and 3 times 2^-16
    const int word = exponent == 0    ? tiny[magnitude]
                     : exponent == 31 ? 255 << 7 | (magnitude & 3) << 5
                                      : (magnitude << 5) + (112 << 7);
    table.high[magnitude] = static_cast<uint8_t>(word >> 8),
    table.low[magnitude] = static_cast<uint8_t>(word);
  }
  return table;
}
inline constexpr WidenedE5M2 WIDENED_E5M2 = widened_e5m2();

// A block as bfloat16 words, arranged as words_of does, of P planes: bfloat16's 3 or 4, or E5M2's 6 or 7.
template <int P>
GAUGEKIT_BLOCK_VBMI2 void bfloat16_words(const Segment& s, const uint8_t*& next, __m512i& lo, __m512i& hi) {
  if constexpr (P <= 4) {
    words_of<false>(_mm512_loadu_si512(s.raw), block_vbmi2<false, P>(s, 0, next), lo, hi);
  } else {
    const __m512i byte = block_vbmi2<true, P - 3>(s, 0, next),
                  sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const auto widened = [byte](const uint8_t* table) __attribute__((target("avx512f,avx512vbmi"))) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(table), byte, _mm512_load_si512(table + 64));
    };
    const __m512i low = widened(WIDENED_E5M2.low);
    const __m512i high =
        _mm512_ternarylogic_epi32(widened(WIDENED_E5M2.high), byte, sign, 0xf8);  // a | b & c
    lo = _mm512_unpacklo_epi8(low, high);
    hi = _mm512_unpackhi_epi8(low, high);
  }
}

template <bool HALF>
GAUGEKIT_AVX512 void join_avx512(const uint8_t* raw, const uint8_t* bytes, int64_t blocks, uint16_t* out) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i lo, hi;
    words_of<HALF>(_mm512_loadu_si512(raw + b * BLOCK), _mm512_loadu_si512(bytes + b * BLOCK), lo, hi);
    _mm512_storeu_si512(out + b * BLOCK, _mm512_permutex2var_epi64(lo, first, hi));
    _mm512_storeu_si512(out + b * BLOCK + 32, _mm512_permutex2var_epi64(lo, second, hi));
  }
}

template <bool HALF>
__attribute__((target("avx2"), always_inline)) inline void words_of(__m256i raw, __m256i byte, __m256i& lo,
                                                                    __m256i& hi) {
  if (!HALF) {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
    const __m256i low =
        _mm256_or_si256(_mm256_and_si256(sign, _mm256_slli_epi16(byte, 7)), _mm256_andnot_si256(sign, raw));
    byte =
        _mm256_or_si256(_mm256_and_si256(sign, raw), _mm256_andnot_si256(sign, _mm256_srli_epi16(byte, 1)));
    raw = low;
  }
  lo = _mm256_unpacklo_epi8(raw, byte);
  hi = _mm256_unpackhi_epi8(raw, byte);
}

template <bool HALF>
GAUGEKIT_AVX2 void join_avx2(const uint8_t* raw, const uint8_t* bytes, int64_t blocks, uint16_t* out) {
  for (int64_t i = 0; i < blocks * BLOCK; i += 32) {
    __m256i lo, hi;
    words_of<HALF>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(raw + i)),
                   _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i)), lo, hi);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permute2x128_si256(lo, hi, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i + 16), _mm256_permute2x128_si256(lo, hi, 0x31));
  }
}
#endif

inline void join(bool half, const uint8_t* raw, const uint8_t* bytes, int64_t blocks, uint16_t* out, Isa l) {
#ifdef GAUGEKIT_X86
  if (l >= Isa::avx512)
    return half ? join_avx512<true>(raw, bytes, blocks, out) : join_avx512<false>(raw, bytes, blocks, out);
  if (l == Isa::avx2)
    return half ? join_avx2<true>(raw, bytes, blocks, out) : join_avx2<false>(raw, bytes, blocks, out);
#endif
#ifdef GAUGEKIT_ARM
  if (l >= Isa::neon)
    return half ? join_neon<true>(raw, bytes, blocks, out) : join_neon<false>(raw, bytes, blocks, out);
#endif
  for (int64_t i = 0; i < blocks * BLOCK; ++i) out[i] = word_of(half, raw[i], bytes[i]);
}

// The first `columns` weights of a row as 16-bit words.
inline void decode_row(const Weight& w, int64_t row, int64_t columns, uint16_t* out, Isa l) {
  alignas(64) uint8_t bytes[SEGMENT + SLACK], tail[SEGMENT + SLACK];
  alignas(64) uint16_t last[SEGMENT];
  for (int64_t s = 0; s < w.segments(); ++s) {
    const Segment segment = segment_of(w, row, s, tail);
    const int64_t count = std::min(SEGMENT, columns - s * SEGMENT);
    bytes_of(w, segment, bytes, l);
    const bool whole = count == segment.blocks * BLOCK;
    join(w.half(), segment.raw, bytes, segment.blocks, whole ? out + s * SEGMENT : last, l);
    if (!whole) std::memcpy(out + s * SEGMENT, last, count * sizeof(uint16_t));
  }
}

// The first `columns` weights of a row of E5M2.
inline void decode_row(const Weight& w, int64_t row, int64_t columns, uint8_t* out, Isa l) {
  alignas(64) uint8_t bytes[SEGMENT + SLACK], tail[SEGMENT + SLACK];
  for (int64_t s = 0; s < w.segments(); ++s) {
    bytes_of(w, segment_of(w, row, s, tail), bytes, l);
    std::memcpy(out + s * SEGMENT, bytes, std::min(SEGMENT, columns - s * SEGMENT));
  }
}

}  // namespace gaugekit::packed
