// How the products on pairs of bfloat16 numbers (packed_linear_pairs.h) keep words and sums, whatever the
// processor. Free of torch.
#pragma once

#include "packed_linear_stream.h"

namespace gaugekit::packed {

constexpr int64_t HALF_BLOCK = BLOCK / 2;

struct alignas(64) WordHalf {
  uint16_t at[HALF_BLOCK];
};

// Words from one half of a row to the other, and from one row to the next: one block more than a row has, so
// that rows do not meet in the same lines of the cache.
constexpr int64_t half_stride(int64_t blocks) { return (blocks + 1) * HALF_BLOCK; }
constexpr int64_t row_stride(int64_t blocks) { return 2 * half_stride(blocks); }

constexpr int64_t FEW = 4;         // rows of x
constexpr int64_t SUMS = 2 * 16;   // of a row of W and a row of x
constexpr int64_t PASS_ROWS = 48;  // of x, whose sums stay in the second-level cache beside the decoded rows
constexpr int64_t PART_BLOCKS = 64;  // of a tile: then its rows of W and x nearly fit the first-level cache

}  // namespace gaugekit::packed
