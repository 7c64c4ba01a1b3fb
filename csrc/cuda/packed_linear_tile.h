// The product of packed weights and up to 16 rows of x on tensor cores, one kernel: a block owns 16 rows of
// W, its warps share K and add their parts in order. What a lane does stands in common/packed_tile.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/packed_tile.h"

namespace gaugekit::packed {
namespace {

constexpr int kTileWarps = 8, kTileColumns = 8;  // warps of a block; rows of x that one product takes
constexpr int64_t kMostTileColumns = 32768;      // of W: the block keeps a bit of each of its weights

__device__ void put(float* to, float value) { *to = value; }
__device__ void put(BFloat16Bits* to, float value) {
  *reinterpret_cast<__nv_bfloat16*>(to) = __float2bfloat16(value);
}
__device__ void put(Float16Bits* to, float value) { *reinterpret_cast<__half*>(to) = __float2half(value); }

__device__ const uint4 kZeros[kLaneWeights / 8] = {};

// A row of masks keeps 4 words more than a multiple of 32, so that a warp's eight rows meet in no bank.
__host__ __device__ constexpr int mask_stride(int blocks) { return (2 * blocks + 31) / 32 * 32 + 4; }

inline int64_t tile_shared_bytes(const Lanes& w) {
  return 4 * kTileRows * (mask_stride(static_cast<int>(w.blocks)) + w.segments);
}

template <bool HALF>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void put_words(uint4 quad, uint32_t* to) {
  to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
}

// A lane's place in one row of W: its first 32 weights and plane words; further ones lie at fixed steps.
template <bool HALF, int C>
struct RowPlace {
  const uint8_t* raw;
  const uint32_t* plane;

  __device__ RowPlace(const Lanes& w, int64_t row)
      : raw(w.raw + row * w.blocks * 64), plane(w.planes + row * Lane<HALF, C>::PLANES * 2 * w.blocks) {}

  __device__ __forceinline__ Lane<HALF, C> load(unsigned half_block, unsigned half_blocks) const {
    Lane<HALF, C> own;
    const uint4* quad = reinterpret_cast<const uint4*>(raw + half_block * kLaneWeights);
    put_words(__ldg(quad), own.raw);
    put_words(__ldg(quad + 1), own.raw + 4);
#pragma unroll
    for (int p = 0; p < Lane<HALF, C>::PLANES; ++p)
      own.plane[p] = __ldg(plane + (p * half_blocks + half_block));
    return own;
  }
};

template <int C>
__device__ __forceinline__ uint32_t escaped_of(const uint32_t* plane) {
  uint32_t mask = plane[0];
#pragma unroll
  for (int p = 1; p < C; ++p) mask &= plane[p];
  return mask;
}

// 16 rows times a lane's 32 columns for each of its four neighbours: eight products on tensor cores a tile of
// x.
template <bool HALF, int C, int TILES>
__device__ __forceinline__ void multiply_step(const Lane<HALF, C> (&own)[2],
                                              const Exponents<HALF, C> (&table)[2],
                                              const uint4* const (&from)[TILES], float (&sum)[TILES][4]) {
  uint32_t x[TILES][kLaneWeights / 2];
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int q = 0; q < kLaneWeights / 8; ++q) put_words(__ldg(from[t] + q), x[t] + 4 * q);
  const Selectors<HALF, C> selectors[2] = {make_selectors(own[0]), make_selectors(own[1])};
#pragma unroll
  for (int s = 0; s < 4; ++s)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t upper[2], lower[2];
      decode_pairs(own[0], selectors[0], table[0], s, half, upper);
      decode_pairs(own[1], selectors[1], table[1], s, half, lower);
      const uint32_t a[4] = {upper[0], lower[0], upper[1], lower[1]};
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const uint32_t b[2] = {pair_of(x[t], s, half, 0), pair_of(x[t], s, half, 1)};
        multiply_add<HALF>(sum[t], a, b);
      }
    }
}

// This warp's part of 16 rows of W times up to 8 * TILES rows of x, and the masks of what escaped.
template <bool HALF, int C, int TILES, class X>
__device__ __forceinline__ void tile_parts(const Lanes& w, const X* x, int batch, uint32_t* masks,
                                           float (&sum)[TILES][4]) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, upper = lane / 4;
  const int64_t first = blockIdx.x * int64_t(kTileRows), last = w.rows - 1;
  const int64_t rows[2] = {min(first + upper, last), min(first + upper + 8, last)};
  const RowPlace<HALF, C> place[2] = {{w, rows[0]}, {w, rows[1]}};
  const Exponents<HALF, C> table[2] = {make_exponents<HALF, C>(w.window[rows[0]]),
                                       make_exponents<HALF, C>(w.window[rows[1]])};
  const unsigned half_blocks = 2 * static_cast<unsigned>(w.blocks);
  const X* own_x[TILES];
  // A column of the product beyond the batch is dropped: any row of x may stand there.
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const int row = upper + t * kTileColumns;
    own_x[t] = x + (row < batch ? row : 0) * w.blocks * 64;
  }
  uint32_t* own_masks = masks + upper * mask_stride(static_cast<int>(w.blocks));
  const int lower_masks = 8 * mask_stride(static_cast<int>(w.blocks));
  unsigned half_block = 4 * warp + lane % 4;
  Lane<HALF, C> next[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) next[r] = place[r].load(min(half_block, half_blocks - 1), half_blocks);
#pragma unroll 1
  for (unsigned begin = 4 * warp; begin < half_blocks;
       begin += 4 * kTileWarps, half_block += 4 * kTileWarps) {
    const Lane<HALF, C> own[2] = {next[0], next[1]};
    const bool inside = half_block < half_blocks;
    // Beyond the last column a lane decodes its last weights again, which no escape makes infinite, times 0.
#pragma unroll
    for (int r = 0; r < 2; ++r)
      next[r] = place[r].load(min(half_block + 4 * kTileWarps, half_blocks - 1), half_blocks);
    if (inside) {
      own_masks[half_block] = escaped_of<C>(own[0].plane);
      own_masks[lower_masks + half_block] = escaped_of<C>(own[1].plane);
    }
    const uint4* from[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      from[t] = inside ? reinterpret_cast<const uint4*>(own_x[t] + half_block * kLaneWeights) : kZeros;
    multiply_step<HALF, C, TILES>(own, table, from, sum);
  }
}

// What the escapes of one row add, for each row of x: 16 threads take them in turns, and every one of the
// threads returns their sums, added in a fixed order.
template <bool HALF, int C, int ROWS, class X>
__device__ __forceinline__ void correct_row(const Lanes& w, int64_t row, const X* x, int batch,
                                            const uint32_t* masks, uint16_t* list, int* segment_base,
                                            float (&sum)[ROWS]) {
  const int thread = threadIdx.x % kTileThreads, words = 2 * static_cast<int>(w.blocks);
  const int each = (words + kTileThreads - 1) / kTileThreads;
  const int first = min(thread * each, words), stop = min(first + each, words);
  int count = 0;
  for (int word = first; word < stop; ++word) count += count_bits(masks[word]);
  int before = count;
#pragma unroll
  for (int step = 1; step < kTileThreads; step *= 2) {
    const int lower = __shfl_up_sync(~0u, before, step, kTileThreads);
    if (thread >= step) before += lower;
  }
  const int total = __shfl_sync(~0u, before, kTileThreads - 1, kTileThreads);
  for (int done = 0; __any_sync(~0u, done < total); done += kListed) {
    list_escapes(w, row, masks, first, stop, before - count, done, list, segment_base);
    __syncwarp();
    const int listed = min(total - done, kListed);
    for (int e = thread; e < listed; e += kTileThreads) {
      const int column = list[e];
      const float difference =
          escape_difference<HALF, C>(w, row, column, segment_base[column / kSegment] + done + e);
      // A weight that was decoded rightly, as a zero is, must not meet an infinity of x once more.
      if (difference == 0) continue;
#pragma unroll
      for (int t = 0; t < ROWS; ++t)
        if (t < batch) sum[t] += difference * widen(x[t * w.blocks * 64 + column]);
    }
    __syncwarp();
  }
#pragma unroll
  for (int t = 0; t < ROWS; ++t)
#pragma unroll
    for (int step = kTileThreads / 2; step; step /= 2)
      sum[t] += __shfl_xor_sync(~0u, sum[t], step, kTileThreads);
}

template <bool HALF, int C, int TILES, class X>
__global__ void __launch_bounds__(kTileWarps* kLanes, 2)
    _packed_linear_tile(Lanes w, const X* x, int batch, const X* bias, X* out) {
  constexpr int ROWS = TILES * kTileColumns;
  extern __shared__ uint32_t masks[];
  __shared__ float parts[kTileWarps][kTileRows][ROWS + 1];
  __shared__ uint16_t list[kTileRows][kListed];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int stride = mask_stride(static_cast<int>(w.blocks));
  int* segment_base = reinterpret_cast<int*>(masks + kTileRows * stride);
  const int64_t first = blockIdx.x * int64_t(kTileRows);
  {
    const int64_t begin = begin_of(w, first, 0), stop = begin_of(w, min(first + kTileRows, w.rows), 0);
    for (int64_t at = begin + threadIdx.x * 128; at < stop; at += kTileWarps * kLanes * 128)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(w.escapes + at));
  }
  float sum[TILES][4] = {};
  tile_parts<HALF, C, TILES>(w, x, batch, masks, sum);
#pragma unroll
  for (int t = 0; t < TILES; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      parts[warp][lane / 4 + i / 2 * 8][t * kTileColumns + lane % 4 * 2 + i % 2] = sum[t][i];
  __syncthreads();

  const int own = threadIdx.x / kTileThreads, t = threadIdx.x % kTileThreads;
  const int64_t row = min(first + own, w.rows - 1);
  float lacking[ROWS] = {};
  correct_row<HALF, C, ROWS>(w, row, x, batch, masks + own * stride, list[own],
                             segment_base + own * w.segments, lacking);
  if (t >= batch || first + own >= w.rows) return;
  float total = 0;
#pragma unroll
  for (int part = 0; part < kTileWarps; ++part) total += parts[part][own][t];
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
    if (i == t) total += lacking[i];
  if (bias) total += widen(bias[row]);
  put(out + t * w.rows + row, total);
}

}  // namespace
}  // namespace gaugekit::packed
