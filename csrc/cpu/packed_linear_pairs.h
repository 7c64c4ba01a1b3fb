// y = x Wᵀ in bfloat16 for up to a few hundred rows of x on processors that multiply pairs of bfloat16
// numbers by themselves: AVX512-BF16, whose parts are here, and ARM's BF16 (packed_linear_bfdot.h). Up to FEW
// rows of x take each block of W as it is decoded. For more, some rows of W are decoded into the
// second-level cache and multiplied by tiles of TILE_W × TILE_X sums that stay in registers from the first
// column to the last. Free of torch.
//
// The order of summation is fixed, the same for every batch, and other than that of packed_linear_product.h.
// With AVX512-BF16 the words of a block lie in two halves of 32, as words_of leaves them. Pair j of a half is
// added to one of 16 running float sums, j, as the instruction does it (vdpbf16ps, to which subnormal numbers
// are zero), half after half, block after block; at a row's end sum is halved by sum[j] += sum[j + w],
// w = 8, 4, 2, 1.
#pragma once

#include "packed_linear_bfdot.h"
#include "packed_linear_pair_layout.h"

namespace gaugekit::packed {

#ifdef GAUGEKIT_X86
#define GAUGEKIT_PAIRS GAUGEKIT_BF16

constexpr Isa PAIRS_LEVEL = Isa::bf16;
constexpr bool PAIRS_OF_E5M2 = true;

// x as words in the order of the sums, zero beyond its columns: [batch][row_stride].
GAUGEKIT_BF16 inline Halves arrange_pairs(const BFloat16* x, int64_t batch, int64_t columns, int64_t blocks) {
  Halves arranged = halves(batch * row_stride(blocks));
  for (int64_t t = 0; t < batch; ++t) {
    const BFloat16* from = x + t * columns;
    uint16_t* to = arranged[0].at + t * row_stride(blocks);
    for (int64_t b = 0; b < blocks; ++b, from += BLOCK, to += BLOCK) {
      const int64_t count = std::min(BLOCK, columns - b * BLOCK);
      BFloat16 last[BLOCK] = {};
      if (count < BLOCK) std::memcpy(last, from, count * sizeof(BFloat16));
      __m512i lo, hi;
      load_words<false, true>(reinterpret_cast<const uint8_t*>(count < BLOCK ? last : from), nullptr, lo, hi);
      _mm512_store_si512(to, lo);
      _mm512_store_si512(to + HALF_BLOCK, hi);
    }
  }
  return arranged;
}

GAUGEKIT_BF16_INLINE __m512 add_pairs(__m512 sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}

// Blocks [b, end) of row `row` of W, from the beginning of a segment on, one after the other: take(b, lo,
// hi). What is asked for ahead walks steadily through the row's planes, which lie one after the other, so far
// ahead that the last one comes in time, too.
template <int C, bool PLAIN, class Take>
GAUGEKIT_BF16_INLINE void each_block(const Weight& w, int64_t row, int64_t b, int64_t end, const Take& take) {
  constexpr int64_t PLANE_BYTES = C * 8;  // a block's
  const int64_t planes_ahead = (C - 1) * 8 * w.blocks + AHEAD_BLOCKS * PLANE_BYTES;
  alignas(64) uint8_t tail[SEGMENT + SLACK];
  for (int64_t s = b / SEGMENT_BLOCKS; b < end; ++s) {
    Segment g{};
    if (!PLAIN) g = segment_of(w, row, s, tail);
    g.raw = begin_of<PLAIN>(w, row, s);
    const uint8_t* next = g.escapes;
    const char* planes =
        reinterpret_cast<const char*>(w.planes) + (row * w.blocks + b) * PLANE_BYTES + planes_ahead;
    if (!PLAIN) {
      _mm_prefetch(reinterpret_cast<const char*>(next + 256), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(w.offsets + row * w.segments() + s + 32), _MM_HINT_T0);
    }
    for (const int64_t stop = b + w.blocks_of(s); b < stop; ++b) {
      _mm_prefetch(reinterpret_cast<const char*>(g.raw + AHEAD_BLOCKS * BLOCK), _MM_HINT_T0);
      if (!PLAIN) _mm_prefetch(planes, _MM_HINT_T0);
      __m512i lo, hi;
      if (PLAIN)
        load_words<false, true>(g.raw, nullptr, lo, hi);
      else
        bfloat16_words<C>(g, next, lo, hi);
      take(b, lo, hi);
      g.raw += STRIDE<PLAIN>, ++g.planes, planes += PLANE_BYTES;
    }
  }
}

// A step of halving two vectors at once: a shuffle brings the far half of a beside the near one of b, and a
// blend, which is cheaper, the others.
GAUGEKIT_BF16_INLINE __m512 halved_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
GAUGEKIT_BF16_INLINE __m512 halved_floats(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
}

// The first two halvings of the sums of four rows of W: lanes hold what is left of rows 0, 1, 2 and 3, four
// floats each.
GAUGEKIT_BF16_INLINE __m512 quarters(const __m512* sum) {
  const __m512 a = halved_lanes(sum[0], sum[1]), b = halved_lanes(sum[2], sum[3]);
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// The totals of four rows of W and up to four rows of x, whose quarters are given, [4 rows of x][4].
GAUGEKIT_BF16_INLINE __m512 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 p = halved_floats(a, b), q = halved_floats(c, d);  // of each lane: a, a, b, b and c, c, d, d
  const __m512 left = _mm512_mask_blend_ps(0xaaaa, p, q), right = _mm512_mask_blend_ps(0x5555, p, q);
  const __m512 by_row = _mm512_add_ps(left, _mm512_permute_ps(right, 0xb1));  // of each lane: a, c, b, d
  const __m512i by_x = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(by_x, by_row);
}

// The totals of four rows of W and T rows of x from their sums: to[t * MOST_ROWS + r].
template <int T>
GAUGEKIT_BF16_INLINE void put_totals(const __m512 (*sum)[TILE_W], float* to) {
  for (int first = 0; first < T; first += 4) {
    __m512 part[4];
    for (int i = 0; i < 4; ++i) part[i] = quarters(sum[std::min(first + i, T - 1)]);
    const __m512 found = totals(part[0], part[1], part[2], part[3]);
    _mm_store_ps(to + first * MOST_ROWS, _mm512_castps512_ps128(found));
    if (first + 1 < T) _mm_store_ps(to + (first + 1) * MOST_ROWS, _mm512_extractf32x4_ps(found, 1));
    if (first + 2 < T) _mm_store_ps(to + (first + 2) * MOST_ROWS, _mm512_extractf32x4_ps(found, 2));
    if (first + 3 < T) _mm_store_ps(to + (first + 3) * MOST_ROWS, _mm512_extractf32x4_ps(found, 3));
  }
}

// T rows of x, at most FEW.
template <int C, bool PLAIN, int T, class Give>
GAUGEKIT_BF16 void multiply_few(const Weight& w, int64_t begin, int64_t end, const uint16_t* x,
                                const Give& give) {
  alignas(64) float found[T][MOST_ROWS];
  __m512 sum[T][TILE_W];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < TILE_W; ++r) sum[t][r] = _mm512_setzero_ps();
  for (int64_t row = begin; row < end; ++row) {
    __m512 here[T];
    for (int t = 0; t < T; ++t) here[t] = _mm512_setzero_ps();
    each_block<C, PLAIN>(w, row, 0, w.blocks, [&](int64_t b, __m512i lo, __m512i hi) GAUGEKIT_BF16 {
      for (int t = 0; t < T; ++t) {
        const uint16_t* from = x + t * row_stride(w.blocks) + b * BLOCK;
        here[t] = add_pairs(add_pairs(here[t], lo, _mm512_load_si512(from)), hi,
                            _mm512_load_si512(from + HALF_BLOCK));
      }
    });
    const int64_t r = (row - begin) % ROWS;
    for (int t = 0; t < T; ++t) sum[t][r % TILE_W] = here[t];
    if (r % TILE_W == TILE_W - 1 || row + 1 == end) put_totals<T>(sum, found[0] + r / TILE_W * TILE_W);
    if (r == ROWS - 1 || row + 1 == end)
      for (int t = 0; t < T; ++t) give(t, row - r, load<ROWS>(found[t], ROWS), r + 1);
  }
}

// The totals of TILE_W decoded rows of W and T rows of x: to[t * MOST_ROWS + r].
template <int T>
GAUGEKIT_BF16 void multiply_tile(const uint16_t* words, const uint16_t* x, int64_t blocks, Ahead& ahead,
                                 float* to) {
  const int64_t stride = row_stride(blocks);
  __m512 sum[T][TILE_W];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < TILE_W; ++r) sum[t][r] = _mm512_setzero_ps();
  for (int64_t at = 0; at < blocks * BLOCK;) {
    ahead.ask();
    for (const int64_t stop = std::min(at + STRETCH * BLOCK, blocks * BLOCK); at < stop; at += HALF_BLOCK) {
      __m512i held[TILE_W];
      for (int r = 0; r < TILE_W; ++r) held[r] = _mm512_load_si512(words + r * stride + at);
      for (int t = 0; t < T; ++t) {
        const __m512i from = _mm512_load_si512(x + t * stride + at);
        for (int r = 0; r < TILE_W; ++r) sum[t][r] = add_pairs(sum[t][r], held[r], from);
      }
    }
  }
  put_totals<T>(sum, to);
}

// The words of row `row` of W, block after block.
template <int C, bool PLAIN>
GAUGEKIT_BF16_INLINE void decode_pairs(const Weight& w, int64_t row, uint16_t* to) {
  each_block<C, PLAIN>(w, row, 0, w.blocks, [&](int64_t b, __m512i lo, __m512i hi) GAUGEKIT_BF16 {
    _mm512_store_si512(to + b * BLOCK, lo);
    _mm512_store_si512(to + b * BLOCK + HALF_BLOCK, hi);
  });
}
#endif

#ifdef GAUGEKIT_PAIRS
template <int C, bool PLAIN, class Give>
GAUGEKIT_PAIRS void multiply_many(const Weight& w, int64_t begin, int64_t end, const uint16_t* x,
                                  int64_t batch, const Give& give) {
  using Tile = void (*)(const uint16_t*, const uint16_t*, int64_t, Ahead&, float*);
  constexpr Tile of_rows[TILE_X] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                    multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};
  const int64_t stride = row_stride(w.blocks), tiles = (batch + TILE_X - 1) / TILE_X;
  const int64_t group = group_rows(w.blocks);
  const int64_t calls = tiles * (group / TILE_W) * ((w.blocks + STRETCH - 1) / STRETCH);
  const Halves decoded = halves(group * stride);
  alignas(64) float found[TILE_X][MOST_ROWS];
  for (int64_t first = begin; first < end; first += group) {
    const int64_t rows = std::min(group, end - first);  // others hold anything
    for (int64_t r = 0; r < rows; ++r) decode_pairs<C, PLAIN>(w, first + r, decoded[0].at + r * stride);
    const int64_t next = PLAIN ? end : std::min(end, first + group);
    Ahead ahead(w, next, std::min(end, next + group), calls);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t from = batch * tile / tiles, count = batch * (tile + 1) / tiles - from;
      for (int64_t r = 0; r < rows; r += TILE_W)
        of_rows[count - 1](decoded[0].at + r * stride, x + from * stride, w.blocks, ahead, found[0] + r);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t r = 0; r < rows; r += ROWS)
          give(from + t, first + r, load<ROWS>(found[t] + r, ROWS), std::min<int64_t>(ROWS, rows - r));
    }
  }
}

template <int C, bool PLAIN, class Give>
void pairs(const Weight& w, int64_t begin, int64_t end, const uint16_t* x, int64_t batch, const Give& give) {
  switch (batch) {
    case 1:
      return multiply_few<C, PLAIN, 1>(w, begin, end, x, give);
    case 2:
      return multiply_few<C, PLAIN, 2>(w, begin, end, x, give);
    case 3:
      return multiply_few<C, PLAIN, 3>(w, begin, end, x, give);
    case FEW:
      return multiply_few<C, PLAIN, FEW>(w, begin, end, x, give);
    default:
      return multiply_many<C, PLAIN>(w, begin, end, x, batch, give);
  }
}

// Rows [begin, end) of W, bfloat16 or E5M2, times `batch` rows of x, arranged by arrange_pairs:
// give(batch row, row, sums, count) is called for each ROWS rows, of which the first `count` have sums.
template <bool PLAIN = false, class Give>
void product_of_pairs(const Weight& w, int64_t begin, int64_t end, const uint16_t* x, int64_t batch,
                      const Give& give) {
  if constexpr (PAIRS_OF_E5M2)
    if (w.e5m2())
      return w.code_bits() == 3 ? pairs<6, PLAIN>(w, begin, end, x, batch, give)
                                : pairs<7, PLAIN>(w, begin, end, x, batch, give);
  return w.code_bits() == 3 ? pairs<3, PLAIN>(w, begin, end, x, batch, give)
                            : pairs<4, PLAIN>(w, begin, end, x, batch, give);
}
#endif

}  // namespace gaugekit::packed
