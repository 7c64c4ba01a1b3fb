// y = x Wᵀ in bfloat16 for many rows of x with AVX512-BF16: sixteen outputs stand in the lanes of a vector,
// and each pair of numbers of x is multiplied with all of them, so that no sum has to be gathered from lanes,
// which takes long where W has few columns (packed_linear_pairs.h). For that, a part of GROUP rows of W at a
// time is decoded and transposed into the second-level cache. Free of torch.
//
// The order of summation is fixed, the same for every batch, and other than that of fewer rows: each sum
// takes its pairs as the instruction does it (vdpbf16ps), one after the other, from the first column to the
// last.
#pragma once

#include "packed_linear_pairs.h"

namespace gaugekit::packed {

#ifdef GAUGEKIT_X86
constexpr int64_t LANES = 16, GROUP = 2 * LANES;  // outputs of a vector, and of a tile
constexpr int64_t TILE_MANY = 8;                  // rows of x, whose sums stay in registers
constexpr int64_t PART_BLOCKS = 4 * SEGMENT_BLOCKS, PART_PAIRS = PART_BLOCKS * BLOCK / 2;
constexpr int64_t PART_STRIDE = PART_BLOCKS * BLOCK + HALF_BLOCK;

// Whether these rows of x are so many, for so few columns, that this product is the faster one. Measured on
// Zen 4: it is from 18, 48 and 128 rows on with 576, 1,536 and 4,096 columns, and from 192 with 14,336. Up to
// 31 rows every batch shall have the same bits.
constexpr bool takes_outputs(int64_t batch, int64_t columns) {
  return batch >= 32 && (batch * 32 >= columns || batch >= 192);
}

// x [batch, columns] with a zero more in each row.
inline Halves arrange_rows(const uint16_t* x, int64_t batch, int64_t columns) {
  Halves arranged = halves((batch * (columns + 1) + HALF_BLOCK - 1) / HALF_BLOCK * HALF_BLOCK);
  for (int64_t t = 0; t < batch; ++t, x += columns) {
    uint16_t* to = arranged[0].at + t * (columns + 1);
    std::memcpy(to, x, columns * sizeof(uint16_t));
    to[columns] = 0;
  }
  return arranged;
}

// Four pairs of each of LANES rows, PART_STRIDE words apart: pair k of all rows to to[GROUP * k].
GAUGEKIT_BF16_INLINE void transpose(const uint16_t* from, uint32_t* to) {
  const auto row = [from](int r) GAUGEKIT_BF16 {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(from + r * PART_STRIDE));
  };
  __m512i v[4];  // lane q holds row 4q + i
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_castsi128_si512(row(i));
    v[i] = _mm512_inserti32x4(v[i], row(4 + i), 1);
    v[i] = _mm512_inserti32x4(v[i], row(8 + i), 2);
    v[i] = _mm512_inserti32x4(v[i], row(12 + i), 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]),
                c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi64(a, b));
  _mm512_store_si512(to + GROUP, _mm512_unpackhi_epi64(a, b));
  _mm512_store_si512(to + 2 * GROUP, _mm512_unpacklo_epi64(c, d));
  _mm512_store_si512(to + 3 * GROUP, _mm512_unpackhi_epi64(c, d));
}

// Blocks [begin, begin + blocks) of `rows` rows of W, at most GROUP: pairs [PART_PAIRS][GROUP], by way of
// `words` [LANES][PART_STRIDE].
template <int C, bool PLAIN>
GAUGEKIT_BF16 void decode_outputs(const Weight& w, int64_t first, int64_t rows, int64_t begin, int64_t blocks,
                                  uint16_t* words, uint32_t* pairs) {
  constexpr int PIECE = 8;  // words
  for (int64_t lane = 0; lane < rows; lane += LANES) {
    for (int64_t r = 0; r < std::min(LANES, rows - lane); ++r) {
      uint16_t* to = words + r * PART_STRIDE;
      each_block<C, PLAIN>(w, first + lane + r, begin, begin + blocks,
                           [to, begin](int64_t b, __m512i lo, __m512i hi) GAUGEKIT_BF16 {
                             _mm512_store_si512(to + (b - begin) * BLOCK, lo);
                             _mm512_store_si512(to + (b - begin) * BLOCK + HALF_BLOCK, hi);
                           });
    }
    uint32_t* to = pairs + lane;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t piece = 0; piece < BLOCK / PIECE; ++piece, to += PIECE / 2 * GROUP)
        transpose(words + b * BLOCK + piece % 2 * HALF_BLOCK + piece / 2 * PIECE, to);
  }
}

// The sums [T][GROUP], `count` pairs further. Rows of x are `stride` numbers apart.
template <int T>
GAUGEKIT_BF16 void multiply_outputs(const uint32_t* pairs, const uint16_t* x, int64_t stride, int64_t count,
                                    bool begins, float* sums) {
  constexpr int V = GROUP / LANES;
  __m512 sum[T][V];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v)
      sum[t][v] = begins ? _mm512_setzero_ps() : _mm512_load_ps(sums + t * GROUP + v * LANES);
  for (int64_t k = 0; k < count; ++k) {
    __m512i held[V];
    for (int v = 0; v < V; ++v) held[v] = _mm512_load_si512(pairs + k * GROUP + v * LANES);
    for (int t = 0; t < T; ++t) {
      int32_t pair;
      std::memcpy(&pair, x + t * stride + 2 * k, sizeof(pair));
      const __m512i from = _mm512_set1_epi32(pair);
      for (int v = 0; v < V; ++v) sum[t][v] = add_pairs(sum[t][v], held[v], from);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) _mm512_store_ps(sums + t * GROUP + v * LANES, sum[t][v]);
}

template <int C, bool PLAIN, class Give>
GAUGEKIT_BF16 void outputs_of(const Weight& w, int64_t begin, int64_t end, const uint16_t* x, int64_t stride,
                              int64_t batch, const Give& give) {
  using Tile = void (*)(const uint32_t*, const uint16_t*, int64_t, int64_t, bool, float*);
  constexpr Tile of_rows[TILE_MANY] = {multiply_outputs<1>, multiply_outputs<2>, multiply_outputs<3>,
                                       multiply_outputs<4>, multiply_outputs<5>, multiply_outputs<6>,
                                       multiply_outputs<7>, multiply_outputs<8>};
  const int64_t tiles = (batch + TILE_MANY - 1) / TILE_MANY;
  const Halves words = halves(LANES * PART_STRIDE),
               decoded = halves(std::min(PART_BLOCKS, w.blocks) * BLOCK * GROUP);
  const std::unique_ptr<FloatBlock[]> kept(new FloatBlock[(batch * GROUP + BLOCK - 1) / BLOCK]);
  uint32_t* pairs = reinterpret_cast<uint32_t*>(decoded[0].at);
  float* sums = kept[0].at;
  for (int64_t first = begin; first < end; first += GROUP) {
    const int64_t rows = std::min(GROUP, end - first);  // other lanes hold anything
    for (int64_t b = 0; b < w.blocks; b += PART_BLOCKS) {
      decode_outputs<C, PLAIN>(w, first, rows, b, std::min(PART_BLOCKS, w.blocks - b), words[0].at, pairs);
      const int64_t column = b * BLOCK, count = std::min(PART_PAIRS, (stride - column) / 2);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t from = batch * tile / tiles, here = batch * (tile + 1) / tiles - from;
        of_rows[here - 1](pairs, x + from * stride + column, stride, count, b == 0, sums + from * GROUP);
      }
    }
    for (int64_t t = 0; t < batch; ++t)
      for (int64_t r = 0; r < rows; r += ROWS)
        give(t, first + r, load<ROWS>(sums + t * GROUP + r, ROWS), std::min<int64_t>(ROWS, rows - r));
  }
}

// As product_of_pairs, x being [batch, stride] bfloat16 words, stride even.
template <bool PLAIN = false, class Give>
void product_of_outputs(const Weight& w, int64_t begin, int64_t end, const uint16_t* x, int64_t stride,
                        int64_t batch, const Give& give) {
  if (w.e5m2())
    return w.code_bits() == 3 ? outputs_of<6, PLAIN>(w, begin, end, x, stride, batch, give)
                              : outputs_of<7, PLAIN>(w, begin, end, x, stride, batch, give);
  return w.code_bits() == 3 ? outputs_of<3, PLAIN>(w, begin, end, x, stride, batch, give)
                            : outputs_of<4, PLAIN>(w, begin, end, x, stride, batch, give);
}
#endif

}  // namespace gaugekit::packed
