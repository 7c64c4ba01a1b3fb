// From a symbol's rank to its slot without memory, for at most 32 symbols: what EncoderTable::slot_of says,
// in tables of 32 entries that registers hold.
#pragma once

#include <algorithm>
#include <cstdint>

#include "rans_format.h"

namespace gaugekit::rans {

constexpr int kCells = 32, kCellPositions = int(kSlots) / kCells, kMostBreaks = 6;

// A symbol's slots come in runs. Those of a symbol with several runs are put one after another: a position
// for each of its ranks, and 128 positions to a cell. Within a cell the slot is the position plus a number
// that changes at breaks.
struct EncoderCells {
  // By index in the table. start << 16 | frequency, `start` the first slot of a symbol with one run, or,
  // where bit 31 is set, the first position of one with several; 1 for a symbol that does not exist.
  uint32_t code[kCells];
  // Of break k (its place in the cell - 1) << 25 | the number from there on; where there is none a place is
  // never reached. The first has that number 12 bits further up, and below it the number before all breaks.
  uint32_t at[kMostBreaks][kCells];
  int breaks;  // the most in any cell; above kMostBreaks the cells are of no use
};

inline void fill(const Table& table, const Buckets& buckets, EncoderCells& out) {
  struct Run {
    int symbol, first, slots;
  };
  Run runs[2 * kCells];
  int size = 0, runs_of[kCells] = {};
  each_run(buckets, [&](int i, int first, int slots) {
    if (size && runs[size - 1].symbol == i) {
      runs[size - 1].slots += slots;
    } else {
      runs[size++] = {i, first, slots};
      ++runs_of[i];
    }
  });

  std::fill_n(out.code, kCells, 1u);
  for (auto& cells : out.at) std::fill_n(cells, kCells, uint32_t(kCellPositions - 1) << 25);
  out.breaks = 0;
  int position = 0, breaks = 0;
  uint32_t before = 0;
  auto put = [&](int first, int slots) {
    const uint32_t number = uint32_t(first - position) & (kSlots - 1);
    for (const int end = position + slots; position < end;) {
      const int cell = position / kCellPositions, place = position % kCellPositions;
      if (place == 0) {
        breaks = 0;
        out.at[0][cell] |= number;
      } else if (number != before && breaks++ < kMostBreaks) {
        const uint32_t lowest = breaks == 1 ? number << 12 | (out.at[0][cell] & (kSlots - 1)) : number;
        out.at[breaks - 1][cell] = uint32_t(place - 1) << 25 | lowest;
      }
      before = number;
      out.breaks = std::max(out.breaks, breaks);
      position = std::min(end, (cell + 1) * kCellPositions);
    }
  };
  for (int i = 0; i < table.size; ++i) {
    const bool several = runs_of[i] > 1;
    uint32_t start = uint32_t(position) | 1u << 15;
    for (const Run* run = runs; run < runs + size; ++run) {
      if (run->symbol != i) continue;
      if (several)
        put(run->first, run->slots);
      else
        start = uint32_t(run->first);
    }
    out.code[i] = start << 16 | table.frequency[i];
  }
}

}  // namespace gaugekit::rans
