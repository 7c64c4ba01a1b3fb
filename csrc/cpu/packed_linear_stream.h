// y = x Wᵀ for a few rows x on AVX-512, and `product` for every processor. For one or two rows of x the rows
// of W stream by in the order of memory, and each block is decoded in registers. For more, rows of W take
// turns segment by segment, so that x stays near: up to four rows of x take each block as it is decoded, more
// take the words of a segment, decoded once. The sums are those of packed_linear_product.h. Free of torch.
#pragma once

#include "packed_linear_product.h"

namespace gaugekit::packed {

#ifdef GAUGEKIT_X86
// How far ahead of the product memory is asked for: 64 blocks hide its latency.
constexpr int64_t AHEAD_BLOCKS = 64, AHEAD_SEGMENTS = AHEAD_BLOCKS / SEGMENT_BLOCKS;

// Rows [begin, end) of W by segments: ROWS rows take turns, so that x comes from the second-level cache once
// for all of them.
struct Place {
  int64_t begin, end, segments;
  int64_t first, row, segment;  // first row of the group; the place itself

  Place(int64_t begin, int64_t end, int64_t segments)
      : begin(begin), end(end), segments(segments), first(begin), row(begin), segment(0) {}
  bool done() const { return first >= end; }
  int64_t last_row() const { return std::min<int64_t>(first + ROWS, end) - 1; }
  void advance() {
    if (row < last_row()) {
      ++row;
    } else if (++segment < segments) {
      row = first;
    } else {
      first += ROWS, row = first, segment = 0;
    }
  }
};

// Asks for all of a segment but its raw bytes, which the product asks for block by block.
inline void prefetch_segment(const Weight& w, int64_t row, int64_t s) {
  prefetch_planes(w, row, s);
  const int32_t* offset = w.offsets + row * w.segments() + s;
  _mm_prefetch(reinterpret_cast<const char*>(offset + 64), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(w.escapes + *offset), _MM_HINT_T0);
}

template <bool HALF, int C, bool PLAIN>
__attribute__((target("avx512f,avx512bw,bmi,popcnt"), always_inline)) inline void block_words(
    const Segment& g, int64_t b, const uint8_t*& next, __m512i& lo, __m512i& hi) {
  const uint8_t* raw = g.raw + b * STRIDE<PLAIN>;
  if (PLAIN)
    load_words<HALF, true>(raw, nullptr, lo, hi);
  else
    words_of<HALF>(_mm512_loadu_si512(raw), block_avx512<HALF, C>(g, b, next), lo, hi);
}

template <bool HALF, int T>
__attribute__((target("avx512f,avx512bw,f16c"), always_inline)) inline void add_block(__m512i lo, __m512i hi,
                                                                                      const float* x,
                                                                                      int64_t x_stride,
                                                                                      __m512 sum[T][4]) {
  __m512 w[4];
  widen<HALF>(lo, hi, w);
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < 4; ++v)
      sum[t][v] = _mm512_fmadd_ps(w[v], _mm512_load_ps(x + t * x_stride + 16 * v), sum[t][v]);
}

template <int T>
__attribute__((target("avx512f"), always_inline)) inline void load_sums(const float* from, __m512 sum[T][4]) {
  for (int i = 0; i < 4 * T; ++i) sum[i / 4][i % 4] = _mm512_load_ps(from + 16 * i);
}
template <int T>
__attribute__((target("avx512f"), always_inline)) inline void store_sums(const __m512 sum[T][4], float* to) {
  for (int i = 0; i < 4 * T; ++i) _mm512_store_ps(to + 16 * i, sum[i / 4][i % 4]);
}

// A segment times T rows of x; `ahead` is asked for meanwhile.
template <bool HALF, int C, bool PLAIN, int T>
GAUGEKIT_AVX512 void multiply_segment(const Segment& g, const uint8_t* ahead, const float* x,
                                      int64_t x_stride, float* sums) {
  __m512 sum[T][4];
  load_sums<T>(sums, sum);
  const uint8_t* next = g.escapes;
  for (int64_t b = 0; b < g.blocks; ++b) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + b * BLOCK), _MM_HINT_T0);
    __m512i lo, hi;
    block_words<HALF, C, PLAIN>(g, b, next, lo, hi);
    add_block<HALF, T>(lo, hi, x + b * BLOCK, x_stride, sum);
  }
  store_sums<T>(sum, sums);
}

// The words of a segment as words_of leaves them, two registers a block.
template <bool HALF, int C, bool PLAIN>
GAUGEKIT_AVX512 void decode_segment(const Segment& g, const uint8_t* ahead, uint16_t* words) {
  const uint8_t* next = g.escapes;
  for (int64_t b = 0; b < g.blocks; ++b) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + b * BLOCK), _MM_HINT_T0);
    __m512i lo, hi;
    block_words<HALF, C, PLAIN>(g, b, next, lo, hi);
    _mm512_store_si512(words + b * BLOCK, lo);
    _mm512_store_si512(words + b * BLOCK + 32, hi);
  }
}

template <bool HALF, int T>
GAUGEKIT_AVX512 void multiply_words(const uint16_t* words, int64_t blocks, const float* x, int64_t x_stride,
                                    float* sums) {
  __m512 sum[T][4];
  load_sums<T>(sums, sum);
  for (int64_t b = 0; b < blocks; ++b)
    add_block<HALF, T>(_mm512_load_si512(words + b * BLOCK), _mm512_load_si512(words + b * BLOCK + 32),
                       x + b * BLOCK, x_stride, sum);
  store_sums<T>(sum, sums);
}

// total() in the same order.
GAUGEKIT_AVX512 inline float total_avx512(const float* sums) {
  const auto eight = [sums](int i) GAUGEKIT_AVX512 {
    return _mm256_add_ps(_mm256_add_ps(_mm256_load_ps(sums + i), _mm256_load_ps(sums + 16 + i)),
                         _mm256_add_ps(_mm256_load_ps(sums + 32 + i), _mm256_load_ps(sums + 48 + i)));
  };
  const __m256 u = _mm256_add_ps(eight(0), eight(8));
  const __m128 v = _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1));
  const __m128 s = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// One or two rows of x (T): rows [begin, end) of W one after the other.
template <bool HALF, int C, bool PLAIN, int T, class Give>
GAUGEKIT_AVX512 void stream_rows(const Weight& w, int64_t begin, int64_t end, const float* x,
                                 const Give& give) {
  constexpr int64_t PLANE_BYTES = planes_of<HALF, C> * 8;  // a block's
  // A row's planes lie one after the other. What is asked for walks through them steadily, so far ahead that
  // the last plane comes in time, too.
  const int64_t planes_ahead = (planes_of<HALF, C> - 1) * 8 * w.blocks + AHEAD_BLOCKS * PLANE_BYTES;
  const int64_t segments = w.segments(), x_stride = w.blocks * BLOCK;
  alignas(64) uint8_t tail[SEGMENT + SLACK];
  alignas(64) float sums[T * BLOCK];
  for (int64_t row = begin; row < end; ++row) {
    __m512 sum[T][4];
    for (int i = 0; i < 4 * T; ++i) sum[i / 4][i % 4] = _mm512_setzero_ps();
    for (int64_t s = 0; s < segments; ++s) {
      Segment g{};
      if (!PLAIN) g = segment_of(w, row, s, tail);
      g.raw = begin_of<PLAIN>(w, row, s);
      const uint8_t *next = g.escapes, *stop = g.raw + w.blocks_of(s) * STRIDE<PLAIN>;
      const float* xs = x + s * SEGMENT;
      const char* planes = reinterpret_cast<const char*>(w.planes) +
                           (row * w.blocks + s * SEGMENT_BLOCKS) * PLANE_BYTES + planes_ahead;
      if (!PLAIN) {
        _mm_prefetch(reinterpret_cast<const char*>(next + 256), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w.offsets + row * segments + s + 32), _MM_HINT_T0);
      }
      for (; g.raw != stop; g.raw += STRIDE<PLAIN>, ++g.planes, planes += PLANE_BYTES, xs += BLOCK) {
        _mm_prefetch(reinterpret_cast<const char*>(g.raw + AHEAD_BLOCKS * BLOCK), _MM_HINT_T0);
        if (!PLAIN) _mm_prefetch(planes, _MM_HINT_T0);
        __m512i lo, hi;
        block_words<HALF, C, PLAIN>(g, 0, next, lo, hi);
        add_block<HALF, T>(lo, hi, xs, x_stride, sum);
      }
    }
    store_sums<T>(sum, sums);
    for (int t = 0; t < T; ++t) give(t, row, total_avx512(sums + t * BLOCK));
  }
}

// More rows of x, up to MAX_BATCH.
template <bool HALF, int C, bool PLAIN, class Give>
void stream_segments(const Weight& w, int64_t begin, int64_t end, const float* x, int64_t batch,
                     const Give& give) {
  constexpr int64_t PASS = 4;  // rows of x that take a block at once
  using Fused = void (*)(const Segment&, const uint8_t*, const float*, int64_t, float*);
  using Pass = void (*)(const uint16_t*, int64_t, const float*, int64_t, float*);
  constexpr Fused three = multiply_segment<HALF, C, PLAIN, 3>, four = multiply_segment<HALF, C, PLAIN, PASS>;
  constexpr Pass passes[] = {multiply_words<HALF, 1>, multiply_words<HALF, 2>, multiply_words<HALF, 3>,
                             multiply_words<HALF, 4>};
  alignas(64) uint8_t tail[SEGMENT + SLACK];
  alignas(64) uint16_t words[ROWS][SEGMENT];
  alignas(64) float sums[ROWS][MAX_BATCH * BLOCK];
  const int64_t x_stride = w.blocks * BLOCK;
  Place at(begin, end, w.segments()), soon = at;
  for (int64_t i = 0; i < AHEAD_SEGMENTS; ++i) soon.advance();
  for (; !at.done(); at.advance()) {
    const int64_t r = at.row - at.first, s = at.segment;
    if (s == 0) std::memset(sums[r], 0, batch * BLOCK * sizeof(float));
    const float* xs = x + s * SEGMENT;
    const uint8_t* ahead =
        begin_of<PLAIN>(w, soon.done() ? at.row : soon.row, soon.done() ? s : soon.segment);
    if (!PLAIN && !soon.done()) prefetch_segment(w, soon.row, soon.segment);
    soon.advance();
    Segment g{};
    if (!PLAIN) g = segment_of(w, at.row, s, tail);
    g.raw = begin_of<PLAIN>(w, at.row, s), g.blocks = w.blocks_of(s);
    if (batch <= PASS) {
      (batch == 3 ? three : four)(g, ahead, xs, x_stride, sums[r]);
    } else {
      decode_segment<HALF, C, PLAIN>(g, ahead, words[r]);
      if (at.row == at.last_row())
        for (int64_t t = 0; t < batch; t += PASS)
          for (int64_t i = 0; i <= r; ++i)
            passes[std::min(PASS, batch - t) - 1](words[i], g.blocks, xs + t * x_stride, x_stride,
                                                  sums[i] + t * BLOCK);
    }
    if (s + 1 == at.segments && at.row == at.last_row())
      for (int64_t i = 0; i <= r; ++i)
        for (int64_t t = 0; t < batch; ++t) give(t, at.first + i, total_avx512(sums[i] + t * BLOCK));
  }
}

template <bool HALF, int C, bool PLAIN, class Give>
void stream(const Weight& w, int64_t begin, int64_t end, const float* x, int64_t batch, const Give& give) {
  if (batch == 1) return stream_rows<HALF, C, PLAIN, 1>(w, begin, end, x, give);
  if (batch == 2) return stream_rows<HALF, C, PLAIN, 2>(w, begin, end, x, give);
  stream_segments<HALF, C, PLAIN>(w, begin, end, x, batch, give);
}
#endif

// Rows [begin, end) of W times `batch` arranged rows of x: give(batch row, row, sum) is called once for each
// sum.
template <bool PLAIN = false, class Give>
void product(const Weight& w, int64_t begin, int64_t end, const float* x, int64_t batch, Isa l,
             const Give& give) {
#ifdef GAUGEKIT_X86
  if (l >= Isa::avx512 && w.segments() > 0) {
    if (w.half())
      return w.code_bits() == 3 ? stream<true, 3, PLAIN>(w, begin, end, x, batch, give)
                                : stream<true, 4, PLAIN>(w, begin, end, x, batch, give);
    return w.code_bits() == 3 ? stream<false, 3, PLAIN>(w, begin, end, x, batch, give)
                              : stream<false, 4, PLAIN>(w, begin, end, x, batch, give);
  }
#endif
  product_by_segments<PLAIN>(w, begin, end, x, batch, l, give);
}

}  // namespace gaugekit::packed
