// Attention from one cache on a split of a sequence's rows, as the warps of one block do it on tensor cores.
//
// Up to 16 query rows, the heads of a group times its queries, are one operand of m16n8k16. A tile of 16 rows
// of the cache comes to shared memory once, each row by a bulk copy, and is the other operand twice: of the
// scores, and transposed of the weighted sums. Warps share the channels: a step is 16 channels, and steps 2p
// and 2p + 1 of a warp are half a row apart, where the partners of a rotation are. Each warp adds up the
// scores that all of them leave and takes the softmax for itself, so one barrier a tile is enough.
//
// M is the machine: CUDA's instructions (cuda/single_cache_attention_warp.h), or a test that runs the threads
// of a block on the processor and emulates matrix instructions and copies. Free of CUDA's and torch's
// headers.
#pragma once

#include "common/single_cache_call.h"

namespace gaugekit::cache {

// Forms: means is slices beside the uniform attention, turned has keys RoPE(gain ⊙ row).
enum class Form { plain, means, turned };

struct alignas(16) Quad {
  float of[4];
};
struct alignas(8) Pair {
  float of[2];
};

GAUGEKIT_HD GAUGEKIT_INLINE bool has_step(int step, int warp, int width) {
  return kStepChannels * (step / 2 * kWarps + warp) < width / 2;
}

GAUGEKIT_HD GAUGEKIT_INLINE int channel_of(int step, int warp, int width) {
  return step % 2 * (width / 2) + kStepChannels * (step / 2 * kWarps + warp);
}

// Query rows lane / 4 and lane / 4 + 8 are a lane's.
GAUGEKIT_HD GAUGEKIT_INLINE int row_of(int lane, int half) { return lane / 4 + 8 * half; }

// Whether a channel is among the values of a query row's head.
GAUGEKIT_HD GAUGEKIT_INLINE bool is_own(const Call& f, int row, int channel) {
  const int slice = f.sliced() ? row / f.queries * f.values : 0;
  return row < f.rows() && slice <= channel && channel < slice + f.values;
}

// What a lane holds of its query rows: their masks, maxima, part of their totals, and fragments of their
// queries and of their sums.
template <int STEPS>
struct Lane {
  int first[2], last[2];
  uint32_t own[2];  // a bit a step: is_own; for means
  float top[2], total[2];
  uint32_t q[STEPS][4];
  float sum[STEPS][8];
};

template <Form FORM, class M, int STEPS>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void begin_lane(const M& m, const Call& f, const Work& at,
                                                Lane<STEPS>& lane) {
  const int rows = f.rows(), means = f.gamma && !f.sliced() ? f.queries : 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_of(m.lane, half), t = row % f.queries;
    const Seen seen = seen_of(f, at.batch, t);
    lane.first[half] = seen.first;
    lane.last[half] = row < rows + means ? least(seen.last, at.last) : seen.first;
    lane.top[half] = kLow, lane.total[half] = 0, lane.own[half] = 0;
    const int64_t head = at.group * f.repeats + row / f.queries;
    const uint32_t* q = f.q + at.batch * f.q_batch + head * f.q_head + t * f.q_query + m.lane % 4;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int channel = channel_of(step, m.warp, f.width);
      if (FORM == Form::means) lane.own[half] |= uint32_t(is_own(f, row, channel)) << step;
      const bool here = row < rows && has_step(step, m.warp, f.width);
      lane.q[step][half] = here ? q[channel / 2] : 0;
      lane.q[step][half + 2] = here ? q[channel / 2 + 4] : 0;
    }
  }
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int i = 0; i < 8; ++i) lane.sum[step][i] = 0;
}

// A stage holds a tile's rows, each in halves of STEPS / 2 steps of every warp, with zeros behind a narrower
// half; then, where keys turn, the rows' cosines and sines. Eight rows meet in no bank.
template <int STEPS>
struct Stage {
  static constexpr int half = STEPS / 2 * kWarps * kStepChannels * 2, row = 2 * half + 16,
                       tables = kTileRows * row;
  static GAUGEKIT_HD GAUGEKIT_INLINE constexpr int table_row(int pairs) { return 4 * pairs + 32; }
  static GAUGEKIT_HD GAUGEKIT_INLINE constexpr int bytes(int pairs) {
    return tables + (pairs ? 2 * kTileRows * table_row(pairs) : 0);
  }
  static GAUGEKIT_HD GAUGEKIT_INLINE constexpr int place(int stage, int pairs) {
    return kScoreBytes + kBarrierBytes + stage * bytes(pairs);
  }
  // Where the channels of a step begin in a row.
  static GAUGEKIT_HD GAUGEKIT_INLINE int step(int step, int warp) {
    return step % 2 * half + 2 * kStepChannels * (step / 2 * kWarps + warp);
  }
  // Where a lane's row of the four 8x8 matrices of a step begins: rows 0 to 7 of its channels 0 to 7 and 8 to
  // 15, then rows 8 to 15.
  static GAUGEKIT_HD GAUGEKIT_INLINE int matrix(int lane) {
    return (lane / 16 * 8 + lane % 8) * row + lane / 8 % 2 * 16;
  }
};

// A block may have 227 KiB of Hopper's shared memory, of two on a multiprocessor each 113.
static_assert(Stage<kMostSteps>::place(kStages, 0) <= 227 * 1024);
static_assert(Stage<kMostTurnedSteps>::place(kStages, kMostTurnedSteps / 2 * kWarps * kStepChannels) <=
              227 * 1024);
static_assert(Stage<8>::place(kStages, 0) <= 113 * 1024);

// Zeros where no copy writes.
template <int STEPS, class M>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void clear_padding(const M& m, const Call& f) {
  using At = Stage<STEPS>;
  for (int r = m.warp; r < 2 * kStages * kTileRows; r += kWarps) {
    char* half =
        m.shared + At::place(r / 2 / kTileRows, f.pairs) + r / 2 % kTileRows * At::row + r % 2 * At::half;
    for (int at = f.width + 16 * m.lane; at < At::half; at += 16 * kLanes)
      *reinterpret_cast<Quad*>(half + at) = Quad{};
  }
}

// Has a tile's rows brought to a stage, two by one lane of each warp: no lane waits for many others to issue
// theirs. Past the last row it comes again: it is weighed by 0, and what nobody sees, which may be no number,
// is not read.
template <int STEPS, class M>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void bring_tile(M& m, const Call& f, const Work& at, int tile, int stage) {
  using At = Stage<STEPS>;
  constexpr int each = kTileRows / kWarps;
  if (!m.elected()) return;
  const int warp = m.fresh(m.warp), group = m.fresh(at.group), batch = m.fresh(at.batch);
  const int table_bytes = 4 * f.pairs, place = At::place(stage, f.pairs);
  if (warp == 0) m.expect(stage, 2 * kTileRows * (f.width + table_bytes));
  int j[each];
  const char* from[each];  // all before the first copy: pages are looked up side by side
#pragma unroll
  for (int i = 0; i < each; ++i) {
    j[i] = least(at.first + tile * kTileRows + warp * each + i, at.last - 1);
    from[i] = row_at(f, batch, group, j[i]);
  }
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int row = warp * each + i, to = place + row * At::row;
    const bool whole = f.width == At::half;
    m.copy(stage, to, from[i], whole ? 2 * f.width : f.width);
    if (!whole) m.copy(stage, to + At::half, from[i] + f.width, f.width);
    if (!f.pairs) continue;
    const int tables = place + At::tables + row * At::table_row(f.pairs);
    m.copy(stage, tables, f.cos + int64_t(j[i]) * f.pairs, table_bytes);
    m.copy(stage, tables + kTileRows * At::table_row(f.pairs), f.sin + int64_t(j[i]) * f.pairs, table_bytes);
  }
}

// The words of two partners' fragments, and what they are as keys: RoPE(gain ⊙ row). `channel` is the lane's
// first of the first half, `tables` where the tile's cosines begin.
template <int STEPS, class M>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void turn_keys(const M& m, const Call& f, int tables, int channel,
                                               uint32_t (&low)[4], uint32_t (&high)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = channel + i % 2 * 8, row = m.lane / 4 + i / 2 * 8;
    Pair x = m.unpack(low[i]), y = m.unpack(high[i]), cos{{1, 1}}, sin{{0, 0}};
    if (at < f.pairs) {
      const int each = Stage<STEPS>::table_row(f.pairs);
      const char* place = m.shared + tables + row * each + 4 * at;
      cos = *reinterpret_cast<const Pair*>(place);
      sin = *reinterpret_cast<const Pair*>(place + kTileRows * each);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float a = f.gain ? x.of[k] * f.gain[at + k] : x.of[k];
      const float b = f.gain ? y.of[k] * f.gain[f.width / 2 + at + k] : y.of[k];
      x.of[k] = a * cos.of[k] - b * sin.of[k];
      y.of[k] = b * cos.of[k] + a * sin.of[k];
    }
    low[i] = m.pack(x.of[0], x.of[1]), high[i] = m.pack(y.of[0], y.of[1]);
  }
}

// What the warp's channels add to the scores of a tile: numbers 0 to 3 with its first eight rows.
template <Form FORM, class M, int STEPS>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void multiply_keys(M& m, const Call& f, int place, const Lane<STEPS>& lane,
                                                   Quad (&score)[2]) {
  // In long rows their halves apart: twice as many products that wait for no other.
  using At = Stage<STEPS>;
  constexpr int CHAINS = STEPS > 8 ? 2 : 1;
  float part[CHAINS][8] = {};
  const int rows = place + At::matrix(m.lane) + At::step(0, m.warp);
#pragma unroll
  for (int step = 0; step < STEPS; step += 2) {
    uint32_t x[2][4];
    m.load(rows + At::step(step, 0), x[0]);
    m.load(rows + At::step(step + 1, 0), x[1]);
    if constexpr (FORM == Form::turned)
      if (has_step(step, m.warp, f.width))
        turn_keys<STEPS>(m, f, place + At::tables, channel_of(step, m.warp, f.width) + m.lane % 4 * 2, x[0],
                         x[1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m.multiply_add(part[half % CHAINS], lane.q[step + half], x[half][0], x[half][1]);
      m.multiply_add(part[half % CHAINS] + 4, lane.q[step + half], x[half][2], x[half][3]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    score[i / 4].of[i % 4] = CHAINS == 2 ? part[0][i] + part[CHAINS - 1][i] : part[0][i];
}

// The warp's scores for the others, in the buffer of this turn, then all of theirs, in their order. A buffer
// is written again two barriers later: nobody reads it any more.
template <class M>
GAUGEKIT_DEVICE GAUGEKIT_INLINE Quad* shared_scores(M& m, int turn, int warp) {
  return reinterpret_cast<Quad*>(m.shared) + ((turn * kWarps + warp) * 2) * kLanes + m.lane;
}

template <class M>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void gather_scores(M& m, int turn, Quad (&score)[2]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    score[n] = shared_scores(m, turn, 0)[n * kLanes];
#pragma unroll 2
    for (int warp = 1; warp < kWarps; ++warp) {
      const Quad other = shared_scores(m, turn, warp)[n * kLanes];
#pragma unroll
      for (int i = 0; i < 4; ++i) score[n].of[i] += other.of[i];
    }
  }
}

// A tile's weights as words of a fragment: `seen` holds 1 for each row of the cache that is seen.
struct Weights {
  uint32_t p[4], seen[4];
  float keep[2];  // what is left of earlier sums
};

// The softmax's numerators of a tile whose first row is j. The rows behind the queries' are the uniform
// attention's, whose scores are 0.
template <class M, int STEPS>
GAUGEKIT_DEVICE GAUGEKIT_INLINE Weights weigh(M& m, const Call& f, int j, Quad (&score)[2],
                                              Lane<STEPS>& lane) {
  Weights w;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    bool visible[4];
    float p[4], top = lane.top[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = j + i / 2 * 8 + m.lane % 4 * 2 + i % 2;
      visible[i] = lane.first[half] <= row && row < lane.last[half];
      p[i] = row_of(m.lane, half) < f.rows() ? score[i / 2].of[2 * half + i % 2] * f.scale : 0;
      if (visible[i]) top = fmaxf(top, p[i]);
    }
    top = fmaxf(top, m.exchange(top, 1));
    top = fmaxf(top, m.exchange(top, 2));
    w.keep[half] = m.power(lane.top[half] - top);
    lane.top[half] = top;
    lane.total[half] *= w.keep[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[i] = visible[i] ? m.power(p[i] - top) : 0;
      lane.total[half] += p[i];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      w.p[2 * n + half] = m.pack(p[2 * n], p[2 * n + 1]);
      w.seen[2 * n + half] = m.pack(visible[2 * n], visible[2 * n + 1]);
    }
  }
  return w;
}

// Adds a tile's rows, weighed, to the sums. With means, in a head's slice the row eight away from a row of
// the head's, which no sum there needs, is the uniform attention of the same query.
template <Form FORM, class M, int STEPS>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void add_values(M& m, const Call& f, int place, const Weights& w,
                                                Lane<STEPS>& lane) {
  using At = Stage<STEPS>;
  const int rows = place + At::matrix(m.lane) + At::step(0, m.warp);
  const uint32_t own[2] = {m.fresh(lane.own[0]), m.fresh(lane.own[1])};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    uint32_t x[4], a[4] = {w.p[0], w.p[1], w.p[2], w.p[3]};
    float keep[2] = {w.keep[0], w.keep[1]};
    m.load_transposed(rows + At::step(step, 0), x);
    if constexpr (FORM == Form::means) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (own[1 - half] >> step & 1)
          a[half] = w.seen[1 - half], a[half + 2] = w.seen[3 - half], keep[half] = 1;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) lane.sum[step][i] *= keep[i / 2 % 2];
    m.multiply_add(lane.sum[step], a, x[0], x[2]);
    m.multiply_add(lane.sum[step] + 4, a, x[1], x[3]);
  }
}

// The sums of a lane's row, and what stands eight rows away from it with means.
template <Form FORM, class M, int STEPS>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void leave(M& m, const Call& f, const Work& at, const Lane<STEPS>& lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_of(m.lane, half), rows = f.rows(),
              slice = f.sliced() ? row / f.queries * f.values : 0;
    float total = lane.total[half];
    total += m.exchange(total, 1);
    total += m.exchange(total, 2);
    if (m.warp == 0 && m.lane % 4 == 0 && row < rows) {
      f.tops[at.part * rows + row] = lane.top[half];
      f.totals[at.part * rows + row] = total;
    }
    const int column = m.lane % 4 * 2;
    float* sums = f.sums + (at.part * rows + row) * f.values - slice + column;
    float* means = f.means + (at.part * f.queries + row % f.queries) * f.width + column;
    const bool uniform = f.gamma && !f.sliced() && row >= rows && row < rows + f.queries;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int channel = channel_of(step, m.warp, f.width);
      if (!has_step(step, m.warp, f.width)) continue;
      const float* sum = lane.sum[step] + 2 * half;
      const float* mean = lane.sum[step] + 2 * (FORM == Form::means ? 1 - half : half);
      const bool own = is_own(f, row, channel);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (own) *reinterpret_cast<Pair*>(sums + channel + 8 * n) = Pair{{sum[4 * n], sum[4 * n + 1]}};
        if (FORM == Form::means ? own : uniform)
          *reinterpret_cast<Pair*>(means + channel + 8 * n) = Pair{{mean[4 * n], mean[4 * n + 1]}};
      }
    }
  }
}

// One split of one sequence and group; a block that has no row to look at leaves nothing.
template <Form FORM, int STEPS, class M>
GAUGEKIT_DEVICE GAUGEKIT_INLINE void attend_split(M& m, const Call& f, int pair, int split) {
  const Work at = work_of(f, pair, split);
  if (at.first >= at.last) return;
  using At = Stage<STEPS>;
  clear_padding<STEPS>(m, f);
  m.begin();
  const int tiles = (at.last - at.first + kTileRows - 1) / kTileRows;
  for (int tile = 0; tile < least(tiles, kStages); ++tile) bring_tile<STEPS>(m, f, at, tile, tile);
  Lane<STEPS> lane;
  begin_lane<FORM>(m, f, at, lane);
  for (int tile = 0, stage = 0, phase = 0; tile < tiles; ++tile) {
    const int place = At::place(stage, f.pairs);
    Quad score[2];
    m.wait(stage, phase);
    multiply_keys<FORM>(m, f, place, lane, score);
    for (int n = 0; n < 2; ++n) shared_scores(m, tile % 2, m.warp)[n * kLanes] = score[n];
    m.sync();
    // All have left the stage of the tile before.
    if (tile && tile + kStages - 1 < tiles)
      bring_tile<STEPS>(m, f, at, tile + kStages - 1, (stage ? stage : kStages) - 1);
    gather_scores(m, tile % 2, score);
    add_values<FORM>(m, f, place, weigh(m, f, at.first + tile * kTileRows, score, lane), lane);
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  leave<FORM>(m, f, at, lane);
}

}  // namespace gaugekit::cache
