// Packing (docs/resident.md): a survey that finds every row's window, then the encoding itself. Free of
// torch.
#pragma once

#include "packed_linear_decode.h"

namespace gaugekit::packed {

struct Words {
  const uint16_t* data;
  int64_t rows, columns;
  bool half;
  int first() const { return half ? 10 : 7; }
  int largest() const { return half ? 31 : 255; }
};

// For codes of 3 and of 4 bits: the smallest first exponent that leaves the fewest outside, and how many
// those are.
struct Survey {
  int32_t window[2], escapes[2];
};

#ifdef GAUGEKIT_X86
constexpr int TOP = 16;

// How often each of a row's TOP largest exponents comes, into counts[exponent]; returns the largest.
template <bool HALF>
GAUGEKIT_AVX512 inline int count_top(const uint16_t* x, int64_t columns, uint32_t* counts) {
  const int64_t whole = columns / BLOCK * BLOCK;
  const auto exponents = [](__m512i w) GAUGEKIT_AVX512 {
    return HALF ? _mm512_and_si512(_mm512_srli_epi16(w, 10), _mm512_set1_epi16(31))
                : _mm512_srli_epi16(_mm512_slli_epi16(w, 1), 8);
  };
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < whole; k += 32) most = _mm512_max_epu16(most, exponents(_mm512_loadu_si512(x + k)));
  alignas(64) uint16_t lanes[32];
  _mm512_store_si512(lanes, most);
  int top = *std::max_element(lanes, lanes + 32);
  const auto one = [](uint16_t word) { return HALF ? word >> 10 & 31 : word >> 7 & 255; };
  for (int64_t k = whole; k < columns; ++k) top = std::max<int>(top, one(x[k]));
  constexpr int64_t MOST = 255 * BLOCK;  // what a byte can count
  for (int64_t first = 0; first < whole; first += MOST) {
    __m512i found[TOP];
    for (int i = 0; i < TOP; ++i) found[i] = _mm512_setzero_si512();
    for (int64_t k = first; k < std::min(whole, first + MOST); k += BLOCK) {
      const __m512i e = _mm512_packus_epi16(exponents(_mm512_loadu_si512(x + k)),
                                            exponents(_mm512_loadu_si512(x + k + 32)));
      for (int i = 0; i < TOP; ++i)
        found[i] = _mm512_mask_add_epi8(
            found[i], _mm512_cmpeq_epi8_mask(e, _mm512_set1_epi8(static_cast<char>(top - i))), found[i],
            _mm512_set1_epi8(1));
    }
    for (int i = 0; i < std::min(TOP, top + 1); ++i)
      counts[top - i] +=
          static_cast<uint32_t>(_mm512_reduce_add_epi64(_mm512_sad_epu8(found[i], _mm512_setzero_si512())));
  }
  for (int64_t k = whole; k < columns; ++k)
    if (one(x[k]) > top - TOP) ++counts[one(x[k])];
  return top;
}
#endif

// The smallest window of `width` exponents, with first ones from `low` on, that holds the most of those
// counted.
inline uint32_t best_window(const uint32_t* counts, int low, int high, int width, int32_t& window) {
  uint32_t inside = 0;
  for (int e = low; e < low + width; ++e) inside += counts[e];
  uint32_t best = inside;
  window = low;
  for (int base = low + 1; base <= high; ++base) {
    inside += counts[base + width - 1] - counts[base - 1];
    if (inside > best) best = inside, window = base;
  }
  return best;
}

inline Survey survey_row(const Words& w, int64_t row, Isa l = Isa::portable) {
  // Four tables, so that equal exponents side by side do not wait for each other.
  uint32_t counts[4][256] = {};
  const uint16_t* x = w.data + row * w.columns;
  const int shift = w.first(), largest = w.largest();
  Survey found{};
#ifdef GAUGEKIT_X86
  if (l >= Isa::avx512) {
    const int top =
        w.half ? count_top<true>(x, w.columns, counts[0]) : count_top<false>(x, w.columns, counts[0]);
    const int low = std::max(0, top - TOP + 1);
    uint32_t counted = 0;
    for (int e = low; e <= top; ++e) counted += counts[0][e];
    bool certain = true;
    for (int c = 0; c < 2; ++c) {
      const int width = c == 0 ? 7 : 15, start = std::min(low, largest - width);
      const uint32_t best =
          best_window(counts[0], start, std::min(top, largest - width), width, found.window[c]);
      // A window that begins lower holds what was not counted at most, and the lowest of what was.
      uint32_t others = static_cast<uint32_t>(w.columns) - counted;
      for (int e = start; e < start + width - 1; ++e) others += counts[0][e];
      certain = certain && (start == 0 || best > others);
      found.escapes[c] = static_cast<int32_t>(w.columns - best);
    }
    if (certain) return found;
    std::memset(counts, 0, sizeof(counts));
  }
#endif
  int64_t k = 0;
  for (; k + 4 <= w.columns; k += 4)
    for (int i = 0; i < 4; ++i) ++counts[i][x[k + i] >> shift & largest];
  for (; k < w.columns; ++k) ++counts[0][x[k] >> shift & largest];
  for (int e = 0; e <= largest; ++e) counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e];
  for (int c = 0; c < 2; ++c) {
    const int width = c == 0 ? 7 : 15;
    found.escapes[c] =
        static_cast<int32_t>(w.columns - best_window(counts[0], 0, largest - width, width, found.window[c]));
  }
  return found;
}

// Where one row goes; escapes end at `limit` whatever the survey said.
struct Target {
  uint8_t* raw;
  uint64_t* planes;  // plane p at planes + p * blocks
  int64_t blocks;
  uint8_t *escapes, *limit;
  uint8_t window;
};

// One block from `count` words; returns the escapes' end.
template <bool HALF, int C>
uint8_t* encode_block_portable(const uint16_t* x, int64_t count, const Target& t, int64_t b,
                               uint8_t* escapes) {
  uint64_t plane[planes_of<HALF, C>] = {};
  constexpr int last = (1 << C) - 1;
  for (int64_t i = 0; i < BLOCK; ++i) {
    const uint16_t word = i < count ? x[i] : 0;
    t.raw[b * BLOCK + i] = static_cast<uint8_t>(HALF ? word : (word >> 8 & 0x80) | (word & 0x7f));
    if (i >= count) continue;
    const int exponent = HALF ? word >> 10 & 31 : word >> 7 & 255;
    int code = exponent - t.window;
    if (code < 0 || code >= last) {
      code = last;
      if (escapes < t.limit) *escapes++ = static_cast<uint8_t>(exponent ^ (t.window + last));
    }
    for (int p = 0; p < C; ++p) plane[p] |= uint64_t(code >> p & 1) << i;
    if (HALF)
      for (int p = 0; p < 3; ++p) plane[C + p] |= uint64_t(word >> (p == 2 ? 15 : 8 + p) & 1) << i;
  }
  for (int p = 0; p < planes_of<HALF, C>; ++p) t.planes[p * t.blocks + b] = plane[p];
  return escapes;
}

#ifdef GAUGEKIT_X86
// Bytes of 32 words in their order.
__attribute__((target("avx2"), always_inline)) inline __m256i narrow(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
}

template <int BIT>
__attribute__((target("avx2"), always_inline)) inline uint64_t bits_at(__m256i bytes) {
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(bytes, 7 - BIT)));
}

template <bool HALF, int C>
GAUGEKIT_AVX2 uint8_t* encode_blocks_avx2(const uint16_t* x, int64_t blocks, const Target& t,
                                          uint8_t* escapes) {
  constexpr int last = (1 << C) - 1;
  const __m256i low = _mm256_set1_epi16(0xff), base = _mm256_set1_epi8(static_cast<char>(t.window));
  const __m256i inner = _mm256_set1_epi8(last - 1), outer = _mm256_set1_epi8(last);
  alignas(32) uint8_t exponents[BLOCK];
  for (int64_t b = 0; b < blocks; ++b) {
    uint64_t plane[7] = {}, outside = 0;
    for (int h = 0; h < 2; ++h) {
      const __m256i* from = reinterpret_cast<const __m256i*>(x + b * BLOCK + 32 * h);
      const __m256i w0 = _mm256_loadu_si256(from), w1 = _mm256_loadu_si256(from + 1);
      const __m256i bottom = narrow(_mm256_and_si256(w0, low), _mm256_and_si256(w1, low));
      const __m256i top = narrow(_mm256_srli_epi16(w0, 8), _mm256_srli_epi16(w1, 8));
      __m256i raw = bottom, exponent;
      if (HALF) {
        exponent = _mm256_and_si256(_mm256_srli_epi16(top, 2), _mm256_set1_epi8(31));
      } else {
        const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
        raw = _mm256_or_si256(_mm256_and_si256(sign, top), _mm256_andnot_si256(sign, bottom));
        exponent = narrow(_mm256_and_si256(_mm256_srli_epi16(w0, 7), low),
                          _mm256_and_si256(_mm256_srli_epi16(w1, 7), low));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(t.raw + b * BLOCK + 32 * h), raw);
      _mm256_store_si256(reinterpret_cast<__m256i*>(exponents + 32 * h), exponent);
      __m256i code = _mm256_sub_epi8(exponent, base);
      const __m256i inside = _mm256_cmpeq_epi8(_mm256_min_epu8(code, inner), code);
      code = _mm256_blendv_epi8(outer, code, inside);
      outside |= static_cast<uint64_t>(~static_cast<uint32_t>(_mm256_movemask_epi8(inside))) << 32 * h;
      plane[0] |= bits_at<0>(code) << 32 * h;
      plane[1] |= bits_at<1>(code) << 32 * h;
      plane[2] |= bits_at<2>(code) << 32 * h;
      if (C == 4) plane[3] |= bits_at<3>(code) << 32 * h;
      if (HALF) {
        plane[C] |= bits_at<0>(top) << 32 * h;
        plane[C + 1] |= bits_at<1>(top) << 32 * h;
        plane[C + 2] |= bits_at<7>(top) << 32 * h;
      }
    }
    for (int p = 0; p < planes_of<HALF, C>; ++p) t.planes[p * t.blocks + b] = plane[p];
    for (; outside && escapes < t.limit; outside &= outside - 1)
      *escapes++ = static_cast<uint8_t>(exponents[__builtin_ctzll(outside)] ^ (t.window + last));
  }
  return escapes;
}

// With AVX-512 a plane is the mask of a test, and the exponents of a block stay in one register.
template <bool HALF, int C>
GAUGEKIT_AVX512 uint8_t* encode_blocks_avx512(const uint16_t* x, int64_t blocks, const Target& t,
                                              uint8_t* escapes) {
  constexpr int last = (1 << C) - 1;
  const __m512i base = _mm512_set1_epi8(static_cast<char>(t.window)), outer = _mm512_set1_epi8(last);
  const __m512i turned = _mm512_set1_epi8(static_cast<char>(t.window + last));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), low = _mm512_set1_epi16(0xff);
  const auto bytes = [order](__m512i a, __m512i b) GAUGEKIT_AVX512 {
    return _mm512_permutexvar_epi64(order, _mm512_packus_epi16(a, b));
  };
  const auto bit = [](__m512i v, int i) GAUGEKIT_AVX512 {
    return _mm512_test_epi8_mask(v, _mm512_set1_epi8(static_cast<char>(1 << i)));
  };
  alignas(64) uint8_t patches[BLOCK];
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512i w0 = _mm512_loadu_si512(x + b * BLOCK), w1 = _mm512_loadu_si512(x + b * BLOCK + 32);
    const __m512i bottom = bytes(_mm512_and_si512(w0, low), _mm512_and_si512(w1, low));
    const __m512i top = bytes(_mm512_srli_epi16(w0, 8), _mm512_srli_epi16(w1, 8));
    __m512i raw = bottom, exponent;
    if (HALF) {
      exponent = _mm512_and_si512(_mm512_srli_epi16(top, 2), _mm512_set1_epi8(31));
    } else {
      const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80)), one = _mm512_set1_epi8(1);
      // 0xe4 is (third ? first : second): the sign before the mantissa, seven bits of the exponent before
      // one.
      raw = _mm512_ternarylogic_epi32(top, bottom, sign, 0xe4);
      const __m512i lowest = _mm512_srli_epi16(bottom, 7);
      exponent = _mm512_ternarylogic_epi32(lowest, _mm512_add_epi8(top, top), one, 0xe4);
    }
    _mm512_storeu_si512(t.raw + b * BLOCK, raw);
    __m512i code = _mm512_sub_epi8(exponent, base);
    uint64_t outside = _mm512_cmpge_epu8_mask(code, outer);
    code = _mm512_min_epu8(code, outer);
    for (int p = 0; p < C; ++p) t.planes[p * t.blocks + b] = bit(code, p);
    if (HALF)
      for (int p = 0; p < 3; ++p) t.planes[(C + p) * t.blocks + b] = bit(top, p == 2 ? 7 : p);
    _mm512_store_si512(patches, _mm512_xor_si512(exponent, turned));
    for (; outside && escapes < t.limit; outside &= outside - 1)
      *escapes++ = patches[__builtin_ctzll(outside)];
  }
  return escapes;
}
#endif

// `offsets` gets where each of the row's segments begins, counted from `start`.
template <bool HALF, int C>
void encode_row(const uint16_t* x, int64_t columns, const Target& t, int64_t start, int32_t* offsets, Isa l) {
  uint8_t* escapes = t.escapes;
  for (int64_t first = 0; first < t.blocks; first += SEGMENT_BLOCKS) {
    *offsets++ = static_cast<int32_t>(start + (escapes - t.escapes));
    const int64_t stop = std::min(t.blocks, first + SEGMENT_BLOCKS);
    int64_t b = first;
#ifdef GAUGEKIT_X86
    if (l != Isa::portable) {
      const int64_t whole = std::min(stop, columns / BLOCK) - first;
      const Target part{t.raw + first * BLOCK, t.planes + first, t.blocks, t.escapes, t.limit, t.window};
      if (whole > 0) {
        const auto encode = l >= Isa::avx512 ? encode_blocks_avx512<HALF, C> : encode_blocks_avx2<HALF, C>;
        escapes = encode(x + first * BLOCK, whole, part, escapes), b += whole;
      }
    }
#endif
    for (; b < stop; ++b)
      escapes =
          encode_block_portable<HALF, C>(x + b * BLOCK, std::min(BLOCK, columns - b * BLOCK), t, b, escapes);
  }
}

inline void encode_row(const uint16_t* x, int64_t columns, bool half, int code_bits, const Target& t,
                       int64_t start, int32_t* offsets, Isa l) {
  if (half)
    return code_bits == 3 ? encode_row<true, 3>(x, columns, t, start, offsets, l)
                          : encode_row<true, 4>(x, columns, t, start, offsets, l);
  return code_bits == 3 ? encode_row<false, 3>(x, columns, t, start, offsets, l)
                        : encode_row<false, 4>(x, columns, t, start, offsets, l);
}

}  // namespace gaugekit::packed
