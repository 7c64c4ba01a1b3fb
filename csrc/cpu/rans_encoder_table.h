// What coding one symbol needs.
#pragma once

#include <cstdint>

#include "rans_encoder_cells.h"
#include "rans_format.h"

namespace gaugekit::rans {

struct EncoderTable {
  Table table;
  // start << 16 | frequency. The symbol owns slot_of[start .. start + frequency), ascending.
  uint32_t by_symbol[256];
  uint32_t slot_of[kSlots];
  uint32_t behind[4];  // vector loads may read three entries before a table and behind it
  EncoderCells cells;  // for at most 32 symbols
};

// Consecutive symbols that a histogram counts at once where it compares vectors.
constexpr int kWindow = 10;

// Memory to ask for while a chunk's symbols are coded, which leaves memory idle: what the thread reads next,
// and about where this chunk will be written. Neither is read or written then, and both may be wrong.
struct Ahead {
  const uint8_t* read = nullptr;
  const uint8_t* written = nullptr;
  int lines = 0;  // of 64 bytes, that a group of elements takes; coded it takes some three quarters

  void ask(uint64_t group) const {
    for (uint64_t line = group * lines; line < (group + 1) * lines; ++line) {
      __builtin_prefetch(read + 64 * line, 0, 2);
      __builtin_prefetch(written + 48 * line, 1, 2);
    }
  }
};

// A chunk that is being coded: its symbols, and what each step changes. words[s] is the last word of segment
// s that is written.
struct Coder {
  const uint8_t* symbols;
  const EncoderTable* table;
  uint32_t* states;
  uint16_t** words;
  Ahead ahead;

  // The same behind so many groups.
  Coder behind(uint64_t groups) const {
    const uint64_t lines = groups * ahead.lines;
    return {symbols + groups * kLanes,
            table,
            states,
            words,
            {ahead.read + 64 * lines, ahead.written + 48 * lines, ahead.lines}};
  }
};

// The most breaks in any cell of a chunk's table; more than kMostBreaks where it has no cells that are of
// use.
inline int breaks_of(const Coder& c) {
  return c.table->table.size <= kCells ? c.table->cells.breaks : kMostBreaks + 1;
}

inline void fill(EncoderTable& t) {
  Buckets buckets;
  make_buckets(t.table, buckets);
  uint32_t filled[kMaxSymbols];
  std::memset(t.by_symbol, 0, sizeof(t.by_symbol));
  for (uint32_t i = 0, start = 0; i < uint32_t(t.table.size); start += t.table.frequency[i++]) {
    t.by_symbol[t.table.symbol[i]] = start << 16 | t.table.frequency[i];
    filled[i] = start;
  }
  each_run(buckets, [&](int i, int first, int slots) {
    for (int k = 0; k < slots; ++k) t.slot_of[filled[i] + k] = uint32_t(first + k);
    filled[i] += slots;
  });
  if (t.table.size <= kCells) fill(t.table, buckets, t.cells);
}

}  // namespace gaugekit::rans
