// How the products on pairs of bfloat16 numbers (packed_linear_pairs.h) keep words and sums, whatever the
// processor. Free of torch.
#pragma once

#include <memory>

#include "packed_linear_stream.h"

namespace gaugekit::packed {

constexpr int64_t HALF_BLOCK = BLOCK / 2;

struct alignas(64) WordHalf {
  uint16_t at[HALF_BLOCK];
};

// Memory for words, not cleared: that would take as long as writing them.
using Halves = std::unique_ptr<WordHalf[]>;
inline Halves halves(int64_t words) { return Halves(new WordHalf[words / HALF_BLOCK]); }

// Words of a row of x or of decoded W, block after block, both halves of each; from one row to the next there
// is half a block more, so that rows do not meet in the same lines of the cache.
constexpr int64_t row_stride(int64_t blocks) { return blocks * BLOCK + HALF_BLOCK; }

constexpr int64_t FEW = 4;                 // rows of x
constexpr int64_t TILE_W = 4, TILE_X = 6;  // rows of W and of x whose sums stay in registers
constexpr int64_t MOST_ROWS = 2 * ROWS;    // of W, decoded together
constexpr int64_t STRETCH = 4;             // blocks of a tile, after which more is asked for ahead

// Rows of W decoded together: as many as leave half of a second-level cache of 1 MB to x and to what is asked
// for ahead.
inline int64_t group_rows(int64_t blocks) {
  constexpr int64_t WORDS = 1 << 18;
  return std::clamp(WORDS / row_stride(blocks) / TILE_W * TILE_W, TILE_W, MOST_ROWS);
}

// The packed rows [begin, end) of W, asked for line by line while others are multiplied: memory would stand
// idle meanwhile, and be waited for afterwards. To be asked `calls` times.
class Ahead {
 public:
  Ahead(const Weight& w, int64_t begin, int64_t end, int64_t calls) {
    if (begin < end) {
      const int64_t segments = w.segments();
      if (!w.e5m2()) add(w.raw_at(begin, 0), w.raw_at(end, 0));  // it has none
      add(w.planes_at(begin, 0), w.planes_at(end, 0));
      add(w.offsets + begin * segments, w.offsets + end * segments);
      const auto place = [&w, segments](int64_t row) {
        return w.escapes + std::clamp<int64_t>(w.offsets[row * segments], 0, w.escape_count);
      };
      add(place(begin), place(end));
    }
    share_ = (lines_ + calls - 1) / calls;
  }

  GAUGEKIT_INLINE void ask() {
    for (int64_t i = 0; i < share_ && part_ < PARTS; ++i) {
      __builtin_prefetch(at_[part_], 0, 2);
      if ((at_[part_] += LINE) >= end_[part_]) ++part_;
    }
  }

 private:
  static constexpr int PARTS = 4;
  static constexpr int64_t LINE = 64;

  template <class T>
  void add(const T* begin, const T* end) {
    const char *from = reinterpret_cast<const char*>(begin), *to = reinterpret_cast<const char*>(end);
    if (to <= from) return;
    --part_;
    at_[part_] = from, end_[part_] = to;
    lines_ += (to - from + LINE - 1) / LINE;
  }

  const char *at_[PARTS], *end_[PARTS];
  int64_t lines_ = 0, share_ = 0;
  int part_ = PARTS;
};

}  // namespace gaugekit::packed
