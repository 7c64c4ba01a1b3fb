// y = x Wᵀ for one or two rows x on AVX-512: rows of W stream by, in the order of memory. While a segment is
// multiplied, block by block, the next one is decoded, so that scalar patches and vector arithmetic fill the
// processor together. The sums are those of packed_linear_product.h. Free of torch.
#pragma once

#include "packed_linear_product.h"

namespace gaugekit::packed {

#ifdef GAUGEKIT_X86
// How far ahead of the product memory is asked for: 64 blocks hide its latency.
constexpr int64_t AHEAD_BLOCKS = 64;

// `exponents` of a block, `further`: float16's planes after the code's, in steps of `stride`.
template <bool HALF, bool PLAIN, int T>
__attribute__((target("avx512f,avx512bw,f16c"), always_inline)) inline void multiply_block(
    const uint8_t* raw, const uint8_t* exponents, const uint64_t* further, int64_t stride, const float* x,
    int64_t x_stride, __m512 sum[T][4]) {
  __m512i lo, hi;
  __m512 w[4];
  if (PLAIN) {
    load_words<HALF, true>(raw, nullptr, lo, hi);
  } else {
    __m512i byte = _mm512_loadu_si512(exponents);
    if (HALF) {
      byte = _mm512_slli_epi16(byte, 2);  // five bits a byte: nothing crosses into the next
      for (int p = 0; p < 3; ++p)
        byte = _mm512_mask_add_epi8(byte, further[p * stride], byte,
                                    _mm512_set1_epi8(static_cast<char>(p == 2 ? 0x80 : 1 << p)));
    }
    words_of<HALF>(_mm512_loadu_si512(raw), byte, lo, hi);
  }
  widen<HALF>(lo, hi, w);
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < 4; ++v)
      sum[t][v] = _mm512_fmadd_ps(w[v], _mm512_loadu_ps(x + t * x_stride + 16 * v), sum[t][v]);
}

template <bool HALF, int C, bool PLAIN, int T, class Give>
GAUGEKIT_PACKED_AVX512 void stream_rows(const Weight& w, int64_t begin, int64_t end, const float* x,
                                        const Give& give) {
  constexpr int64_t PLANE_BYTES = planes_of<HALF, C> * 8;  // a block's
  alignas(64) uint8_t exponents[2][SEGMENT + SLACK], tail[SEGMENT + SLACK];
  alignas(64) float sums[BLOCK];
  const int64_t segments = w.segments(), x_stride = w.blocks * BLOCK;
  uint8_t *from = exponents[0], *to = exponents[1];
  Segment coming{};  // decoded into `to` while the one before it is multiplied out of `from`
  if (!PLAIN) coming = segment_of(w, begin, 0, tail);
  for (int64_t b = 0; b < coming.blocks; ++b)
    coming.escapes = block_avx512<false, C>(coming, b, coming.escapes, from + b * BLOCK);
  for (int64_t row = begin; row < end; ++row) {
    __m512 sum[T][4];
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < 4; ++v) sum[t][v] = _mm512_setzero_ps();
    for (int64_t s = 0; s < segments; ++s) {
      const bool last = s + 1 == segments;
      coming.blocks = 0;
      if (!PLAIN && !(last && row + 1 == end))
        coming = segment_of(w, last ? row + 1 : row, last ? 0 : s + 1, tail);
      const uint8_t *raw = begin_of<PLAIN>(w, row, s), *next = coming.escapes;
      const uint64_t* further = w.planes_at(row, s) + C * w.blocks;
      const char* planes = reinterpret_cast<const char*>(w.planes_at(row, s)) + AHEAD_BLOCKS * PLANE_BYTES;
      const float* xs = x + s * SEGMENT;
      const int64_t blocks = w.blocks_of(s), both = std::min(blocks, coming.blocks);
      int64_t b = 0;
      for (; b < both; ++b, planes += PLANE_BYTES, raw += BLOCK) {
        _mm_prefetch(reinterpret_cast<const char*>(raw + AHEAD_BLOCKS * BLOCK), _MM_HINT_T0);
        _mm_prefetch(planes, _MM_HINT_T0);
        next = block_avx512<false, C>(coming, b, next, to + b * BLOCK);
        multiply_block<HALF, false, T>(raw, from + b * BLOCK, further + b, w.blocks, xs + b * BLOCK, x_stride,
                                       sum);
      }
      for (int64_t i = b; i < coming.blocks; ++i)
        next = block_avx512<false, C>(coming, i, next, to + i * BLOCK);
      for (; b < blocks; ++b, raw += STRIDE<PLAIN>)
        multiply_block<HALF, PLAIN, T>(raw, from + b * BLOCK, further + b, w.blocks, xs + b * BLOCK, x_stride,
                                       sum);
      std::swap(from, to);
    }
    for (int t = 0; t < T; ++t) {
      for (int v = 0; v < 4; ++v) _mm512_store_ps(sums + 16 * v, sum[t][v]);
      give(t, row, total(sums));
    }
  }
}

template <bool PLAIN, int T, class Give>
void stream(const Weight& w, int64_t begin, int64_t end, const float* x, const Give& give) {
  if (w.half())
    return w.code_bits() == 3 ? stream_rows<true, 3, PLAIN, T>(w, begin, end, x, give)
                              : stream_rows<true, 4, PLAIN, T>(w, begin, end, x, give);
  return w.code_bits() == 3 ? stream_rows<false, 3, PLAIN, T>(w, begin, end, x, give)
                            : stream_rows<false, 4, PLAIN, T>(w, begin, end, x, give);
}
#endif

// Rows [begin, end) of W times `batch` arranged rows of x: give(batch row, row, sum) is called once for each
// sum.
template <bool PLAIN = false, class Give>
void product(const Weight& w, int64_t begin, int64_t end, const float* x, int64_t batch, Level l,
             const Give& give) {
#ifdef GAUGEKIT_X86
  if (l >= Level::avx512 && begin < end) {
    if (batch == 1) return stream<PLAIN, 1>(w, begin, end, x, give);
    if (batch == 2) return stream<PLAIN, 2>(w, begin, end, x, give);
  }
#endif
  product_by_segments<PLAIN>(w, begin, end, x, batch, l, give);
}

}  // namespace gaugekit::packed
