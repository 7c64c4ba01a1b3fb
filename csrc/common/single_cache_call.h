// A call of attention from one cache as the GPU's kernels take it: which rows of the cache its queries see,
// where they are, the splits they are cut into, and the sum of what the splits leave. Free of CUDA's and
// torch's headers.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/lane.h"

namespace gaugekit::cache {

constexpr int kLanes = 32, kWarps = 8, kQueryRows = 16, kTileRows = 16, kStages = 3, kStepChannels = 16;
constexpr int kSplit = 512;  // rows of the cache; a constant, so that no bit depends on card or batch
constexpr int kMostSteps = 16, kMostTurnedSteps = 4;  // of a warp; where keys turn
constexpr int kFar = 1 << 29;                         // beyond every position, and the most rows
constexpr float kLow = -1e30f;  // far below any score, and finite: the difference of two of them is 0
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kScoreBytes = 2 * kWarps * kQueryRows * kTileRows * 4, kBarrierBytes = 128;

// A call, as host and device see it. Tables and parts are float32.
struct Call {
  const uint32_t* q;                            // pairs of 16-bit numbers
  int64_t q_batch, q_head, q_query;             // in pairs
  const char* cache;                            // 16-bit numbers
  int64_t batch_bytes, group_bytes, row_bytes;  // from one to the next; of pages, a page is a batch
  const int32_t* table;
  int64_t pages;
  const int64_t *start, *lengths;
  const float *gain, *cos, *sin, *alpha, *beta, *gamma;
  // What a split leaves: sums [rows, values], sums of the rows themselves [queries, width], maxima, totals.
  float *sums, *means, *tops, *totals;
  int page, queries, keys, groups, repeats, width, values, pairs, splits, window;  // window 0: none
  bool causal;
  float scale;  // with log2 e, for powers of 2

  GAUGEKIT_HD int rows() const { return repeats * queries; }
  GAUGEKIT_HD bool sliced() const { return values < width; }
};

GAUGEKIT_HD GAUGEKIT_INLINE int least(int a, int b) { return a < b ? a : b; }
GAUGEKIT_HD GAUGEKIT_INLINE int most(int a, int b) { return a > b ? a : b; }
GAUGEKIT_HD GAUGEKIT_INLINE int within(int64_t x, int low, int high) {
  return x < low ? low : x > high ? high : static_cast<int>(x);
}

// The rows [first, last) of a sequence of `keys` that its query t sees; first = last for none.
struct Seen {
  int position, keys, first, last;
};

GAUGEKIT_HD GAUGEKIT_INLINE Seen seen_of(const Call& f, int batch, int t) {
  const int keys = f.lengths ? within(f.lengths[batch], 0, f.keys) : f.keys;
  const int start = f.start ? within(f.start[batch], -kFar, kFar) : f.causal ? f.keys - f.queries : 0;
  const int position = start + t, first = f.window ? most(position - f.window + 1, 0) : 0;
  int last = f.window ? least(position + f.window, keys) : keys;
  if (f.causal) last = 0 <= position && position < keys ? position + 1 : 0;
  return {position, keys, first, most(first, last)};
}

GAUGEKIT_HD GAUGEKIT_INLINE const char* row_at(const Call& f, int batch, int group, int j) {
  int64_t block = batch, row = j;
  if (f.table) block = f.table[batch * f.pages + j / f.page], row = j % f.page;
  return f.cache + block * f.batch_bytes + group * f.group_bytes + row * f.row_bytes;
}

// A block's work: rows [first, last) of one sequence and group, those of a split that any query sees.
struct Work {
  int batch, group, first, last;
  int64_t part;
};

GAUGEKIT_HD GAUGEKIT_INLINE Work work_of(const Call& f, int pair, int split) {
  Work at{pair / f.groups, pair % f.groups, f.keys, 0, int64_t(pair) * f.splits + split};
  for (int t = 0; t < f.queries; ++t) {
    const Seen seen = seen_of(f, at.batch, t);
    if (seen.first == seen.last) continue;
    at.first = least(at.first, seen.first), at.last = most(at.last, seen.last);
  }
  at.first = most(at.first, split * kSplit);
  at.last = least(at.last, (split + 1) * kSplit);
  return at;
}

// β·A + α·v − γ·C of query row r and channel c of the output, from what the splits left, in their order.
template <class M>
GAUGEKIT_DEVICE GAUGEKIT_INLINE float combined(const Call& f, int pair, int r, int c) {
  const int batch = pair / f.groups, group = pair % f.groups, t = r % f.queries, rows = f.rows();
  const int head = group * f.repeats + r / f.queries, shift = f.sliced() ? r / f.queries * f.values : 0;
  const Seen seen = seen_of(f, batch, t);
  float out = 0, mean = 0, total = 0, top = kLow;
  if (seen.first < seen.last) {
    const int64_t part = int64_t(pair) * f.splits;
    const int begin = seen.first / kSplit, end = (seen.last - 1) / kSplit + 1;
    for (int s = begin; s < end; ++s) top = fmaxf(top, f.tops[(part + s) * rows + r]);
    for (int s = begin; s < end; ++s) {
      const float weight = exp2f(f.tops[(part + s) * rows + r] - top);
      total += weight * f.totals[(part + s) * rows + r];
      out += weight * f.sums[((part + s) * rows + r) * f.values + c];
      if (f.gamma) mean += f.means[((part + s) * f.queries + t) * f.width + shift + c];
    }
    out /= total;
    mean /= static_cast<float>(seen.last - seen.first);
  }
  if (f.beta) out *= f.beta[head];
  if (f.gamma) out -= f.gamma[head] * mean;
  if (f.alpha && 0 <= seen.position && seen.position < seen.keys)
    out += f.alpha[head] *
           M::widen(reinterpret_cast<const uint16_t*>(row_at(f, batch, group, seen.position))[shift + c]);
  return out;
}

}  // namespace gaugekit::cache
