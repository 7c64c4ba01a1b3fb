// y = x Wᵀ for a few rows x, W packed: each segment is decoded once and multiplied with every x. Here is what
// every processor runs, and AVX2; NEON is in packed_linear_neon.h, AVX-512 in packed_linear_stream.h, and
// AVX512-BF16 and ARM's BF16, in other orders of summation, in packed_linear_pairs.h. Free of torch.
//
// The order of summation is fixed, the same on all these processors and for every batch. Weight p of a block
// is added to one of 64 running float sums, (v, j) with p = position(v, j), block after block; at a row's end
// t[j] = (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]), and then t is halved by t[j] += t[j + w], w = 8,
// 4, 2, 1. Products of 16-bit numbers are exact in float, so there fused and separate multiply-adds agree bit
// for bit.
//
// Every path takes a flag PLAIN: the same product on plain 16-bit weights (Weight::plain), which the tests
// hold the packed one against, bit for bit.
#pragma once

#include <type_traits>
#include <vector>

#include "common/simd.h"
#include "packed_linear_decode.h"

namespace gaugekit::packed {

constexpr int ROWS = 8;  // decoded together, so that x comes from the second-level cache once for all of them
constexpr int64_t MAX_BATCH = 16;

// Which weight of a block stands in lane j of vector v, after words_of and the widening to float.
constexpr int position(bool half, int v, int j) {
  return half ? 16 * ((v & 1) * 2 + j / 8) + j % 8 + 8 * (v >> 1)
              : 16 * (j / 4) + 2 * (j % 4) + (v & 1) + 8 * (v >> 1);
}

template <bool PLAIN>
void multiply_portable(bool half, const Tile& f) {
  int place[BLOCK];
  for (int i = 0; i < BLOCK; ++i) place[i] = position(half, i / 16, i % 16);
  for (int64_t b = 0; b < f.blocks; ++b) {
    float words[BLOCK];
    for (int i = 0; i < BLOCK; ++i) {
      uint16_t word;
      if (PLAIN)
        std::memcpy(&word, f.raw + 2 * (b * BLOCK + i), sizeof(word));
      else
        word = word_of(half, f.raw[b * BLOCK + i], f.bytes[b * BLOCK + i]);
      words[i] =
          half ? widen<1>(Vector<uint16_t, 1>{word}, Float16{})[0] : bits_as<float>(uint32_t(word) << 16);
    }
    for (int i = 0; i < BLOCK; ++i) f.sums[i] = words[place[i]] * f.x[b * BLOCK + i] + f.sums[i];
  }
}

#ifdef GAUGEKIT_X86
// The words of half h of a block, arranged as words_of does.
template <bool HALF, bool PLAIN>
__attribute__((target("avx2"), always_inline)) inline void load_words(const uint8_t* raw,
                                                                      const uint8_t* bytes, int h,
                                                                      __m256i& lo, __m256i& hi) {
  const __m256i* from = reinterpret_cast<const __m256i*>(raw) + (PLAIN ? 2 * h : h);
  if (PLAIN) {
    const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    lo = _mm256_permute2x128_si256(a, b, 0x20), hi = _mm256_permute2x128_si256(a, b, 0x31);
  } else {
    const __m256i byte = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes) + h);
    words_of<HALF>(_mm256_loadu_si256(from), byte, lo, hi);
  }
}

// The words of a block, arranged as words_of does.
template <bool HALF, bool PLAIN>
__attribute__((target("avx512f,avx512bw"), always_inline)) inline void load_words(const uint8_t* raw,
                                                                                  const uint8_t* bytes,
                                                                                  __m512i& lo, __m512i& hi) {
  if (PLAIN) {
    const __m512i a = _mm512_loadu_si512(raw), b = _mm512_loadu_si512(raw + 64);
    lo = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), b);
    hi = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), b);
  } else {
    words_of<HALF>(_mm512_loadu_si512(raw), _mm512_loadu_si512(bytes), lo, hi);
  }
}

template <bool HALF, bool PLAIN>
GAUGEKIT_AVX2 void multiply_avx2(const Tile& f) {
  __m256 sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = _mm256_loadu_ps(f.sums + 8 * i);
  for (int64_t b = 0; b < f.blocks; ++b) {
    const float* x = f.x + b * BLOCK;
    _mm_prefetch(reinterpret_cast<const char*>(f.next + b * STRIDE<PLAIN>), _MM_HINT_T0);
    for (int h = 0; h < 2; ++h) {
      __m256i lo, hi;
      load_words<HALF, PLAIN>(f.raw + b * STRIDE<PLAIN>, f.bytes + b * BLOCK, h, lo, hi);
      // Half h of the block fills lanes 8h.. of the four vectors (bfloat16), or vectors h and h + 2
      // (float16).
      if (HALF) {
        const int v = 2 * h;
        const auto add = [&](int i, __m128i word) GAUGEKIT_AVX2 {
          sum[i] = _mm256_fmadd_ps(_mm256_cvtph_ps(word), _mm256_loadu_ps(x + 8 * i), sum[i]);
        };
        add(v, _mm256_castsi256_si128(lo));
        add(v + 1, _mm256_extracti128_si256(lo, 1));
        add(v + 4, _mm256_castsi256_si128(hi));
        add(v + 5, _mm256_extracti128_si256(hi, 1));
      } else {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        const auto add = [&](int i, __m256i word) GAUGEKIT_AVX2 {
          sum[i] = _mm256_fmadd_ps(_mm256_castsi256_ps(word), _mm256_loadu_ps(x + 8 * i), sum[i]);
        };
        add(h, _mm256_slli_epi32(lo, 16));
        add(2 + h, _mm256_and_si256(lo, upper));
        add(4 + h, _mm256_slli_epi32(hi, 16));
        add(6 + h, _mm256_and_si256(hi, upper));
      }
    }
  }
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(f.sums + 8 * i, sum[i]);
}

// The widened weights of a block, in the order of the sums.
template <bool HALF>
__attribute__((target("avx512f,avx512bw"), always_inline)) inline void widen(__m512i lo, __m512i hi,
                                                                             __m512 w[4]) {
  if (HALF) {
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(lo));
    w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(lo, 1));
    w[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(hi));
    w[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(hi, 1));
  } else {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(lo, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(lo, upper));
    w[2] = _mm512_castsi512_ps(_mm512_slli_epi32(hi, 16));
    w[3] = _mm512_castsi512_ps(_mm512_and_si512(hi, upper));
  }
}

template <bool HALF>
GAUGEKIT_AVX512 void arrange_avx512(const uint8_t* words, int64_t blocks, float* to) {
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i lo, hi;
    __m512 x[4];
    load_words<HALF, true>(words + 2 * b * BLOCK, nullptr, lo, hi);
    widen<HALF>(lo, hi, x);
    for (int v = 0; v < 4; ++v) _mm512_store_ps(to + b * BLOCK + 16 * v, x[v]);
  }
}
#endif

struct alignas(64) FloatBlock {
  float at[BLOCK];
};

// x as float in the order of the sums, zero beyond its columns: [batch][blocks][4][16].
template <class S>
std::vector<FloatBlock> arrange(const S* x, int64_t batch, int64_t columns, int64_t blocks, bool half) {
  std::vector<FloatBlock> arranged(batch * blocks);
  int place[BLOCK];
  for (int i = 0; i < BLOCK; ++i) place[i] = position(half, i / 16, i % 16);
  for (int64_t t = 0; t < batch; ++t) {
    int64_t b = 0;
#ifdef GAUGEKIT_X86
    constexpr bool is_half = std::is_same_v<S, Float16>;
    if (!std::is_same_v<S, float> && isa() >= Isa::avx512 && half == is_half) {
      b = columns / BLOCK;
      arrange_avx512<is_half>(reinterpret_cast<const uint8_t*>(x + t * columns), b, arranged[t * blocks].at);
    }
#endif
    for (; b < blocks; ++b) {
      float* to = arranged[t * blocks + b].at;
      const S* from = x + t * columns + b * BLOCK;
      const int64_t count = std::min(BLOCK, columns - b * BLOCK);
      for (int i = 0; i < BLOCK; ++i) to[i] = place[i] < count ? load<1>(from + place[i], 1)[0] : 0.0f;
    }
  }
  return arranged;
}

inline float total(const float* sums) {
  float t[16];
  for (int j = 0; j < 16; ++j) t[j] = (sums[j] + sums[16 + j]) + (sums[32 + j] + sums[48 + j]);
  for (int w = 8; w; w /= 2)
    for (int j = 0; j < w; ++j) t[j] += t[j + w];
  return t[0];
}

template <bool PLAIN>
const uint8_t* begin_of(const Weight& w, int64_t row, int64_t s) {
  return PLAIN ? reinterpret_cast<const uint8_t*>(w.plain + row * w.blocks * BLOCK + s * SEGMENT)
               : w.raw_at(row, s);
}

inline void prefetch_planes(const Weight& w, int64_t row, int64_t s) {
#if defined(GAUGEKIT_X86) || defined(GAUGEKIT_ARM)
  const uint64_t* planes = w.planes_at(row, s);
  for (int64_t p = 0; p < w.plane_count; ++p)
    for (int64_t b = 0; b < SEGMENT_BLOCKS; b += 8) __builtin_prefetch(planes + p * w.blocks + b);
#endif
}

template <bool PLAIN>
void multiply(const Tile& f, bool half, Isa l) {
#ifdef GAUGEKIT_X86
  if (l >= Isa::avx2) return half ? multiply_avx2<true, PLAIN>(f) : multiply_avx2<false, PLAIN>(f);
#endif
#ifdef GAUGEKIT_ARM
  if (l >= Isa::neon) return half ? multiply_neon<true, PLAIN>(f) : multiply_neon<false, PLAIN>(f);
#endif
  multiply_portable<PLAIN>(half, f);
}

// Rows [begin, end) of W: give(batch row, row, sum) is called once for each sum. ROWS rows take turns,
// segment by segment, so that x comes from the second-level cache once for all of them.
template <bool PLAIN, class Give>
void product_by_segments(const Weight& w, int64_t begin, int64_t end, const float* x, int64_t batch, Isa l,
                         const Give& give) {
  alignas(64) uint8_t bytes[SEGMENT + SLACK], tail[SEGMENT + SLACK];
  alignas(64) float sums[ROWS][MAX_BATCH * BLOCK];
  for (int64_t first = begin; first < end; first += ROWS) {
    const int64_t rows = std::min<int64_t>(ROWS, end - first);
    for (int64_t r = 0; r < rows; ++r) std::memset(sums[r], 0, batch * BLOCK * sizeof(float));
    for (int64_t s = 0; s < w.segments(); ++s)
      for (int64_t r = 0; r < rows; ++r) {
        const bool last = s + 1 == w.segments();
        const int64_t row = first + r, next_row = last ? std::min(row + ROWS, w.rows - 1) : row,
                      next = last ? 0 : s + 1;
        if (!PLAIN) {
          prefetch_planes(w, next_row, next);
          bytes_of(w, segment_of(w, row, s, tail), bytes, l);
        }
        for (int64_t t = 0; t < batch; ++t)
          multiply<PLAIN>({begin_of<PLAIN>(w, row, s), bytes, begin_of<PLAIN>(w, next_row, next),
                           x + t * w.blocks * BLOCK + s * SEGMENT, sums[r] + t * BLOCK, w.blocks_of(s)},
                          w.half(), l);
      }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < batch; ++t) give(t, first + r, total(sums[r] + t * BLOCK));
  }
}

}  // namespace gaugekit::packed
