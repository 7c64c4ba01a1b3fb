// How far the integers that were estimated are from the true ones: e = estimate − truth, coded by a table for
// the standard error that is expected of it. Free of torch.
//
// Class i expects a standard error of 2^(i/4 − 4) bins. Classes up to kTables − 1 (2² bins) have a table of
// their own; in wider ones the lowest bits of e are stored as they are, and the rest by the table for it.
// Where even that leaves no more than two bits for the table, all bits are stored as they are. Errors beyond
// the table are an escape and all of their bits.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/bitsback_haar.h"
#include "cpu/bitsback_stack.h"

namespace gaugekit::bitsback {

constexpr int kTables = 25, kSlots = 1 << kTableBits, kMostSymbols = 48;
constexpr int kPlain = -1;        // no table: all bits as they are
constexpr uint32_t kTurned = 64;  // of 4096: the estimate of the last sign is wrong

struct CorrectionTable {
  int reach;  // symbols are −reach ... reach, then the escape
  uint16_t start[kMostSymbols], frequency[kMostSymbols];
  uint8_t symbol[kSlots];
  int escape() const { return 2 * reach + 1; }
};

// The normal distribution function by the grid.
inline double normal_below(double z) {
  const double size = (z < 0 ? -z : z) * kGrid;
  if (!(size < kCells)) return z < 0 ? 0.0 : 1.0;
  const int cell = int(size);
  const auto& grid = normal_grid();
  const double above = __builtin_fma(size - cell, grid[cell + 1] - grid[cell], grid[cell]);
  return z < 0 ? 0.5 - above : 0.5 + above;
}

// The true place lies anywhere in the estimate's bin: the mean over 32 places of the chance that it was
// estimated `e` bins further.
inline CorrectionTable make_table(int index) {
  CorrectionTable table{};
  static const double roots[4] = {1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429};
  const double error = std::ldexp(roots[index % 4], index / 4 - 4);
  table.reach = int(4.5 * error) + 1;
  const int symbols = 2 * table.reach + 2;
  uint32_t used = 0;
  for (int s = 0; s + 1 < symbols; ++s) {
    const double e = s - table.reach;
    double chance = 0;
    for (int i = 0; i < 32; ++i) {
      const double place = (i + 0.5) / 32;
      chance += normal_below((place - e) / error) - normal_below((place - e - 1) / error);
    }
    table.frequency[s] = uint16_t(chance / 32 * (kSlots - symbols)) + 1;
    used += table.frequency[s];
  }
  table.frequency[symbols - 1] = 1;
  table.frequency[table.reach] += uint16_t(kSlots - used - 1);
  uint32_t start = 0;
  for (int s = 0; s < symbols; ++s) {
    table.start[s] = uint16_t(start);
    for (uint32_t i = 0; i < table.frequency[s]; ++i) table.symbol[start++] = uint8_t(s);
  }
  return table;
}

inline const std::vector<CorrectionTable>& correction_tables() {
  static const std::vector<CorrectionTable> tables = [] {
    std::vector<CorrectionTable> all;
    for (int i = 0; i < kTables; ++i) all.push_back(make_table(i));
    return all;
  }();
  return tables;
}

// A class for integers of so many bits: which table, and how many bits as they are.
struct Split {
  int table, low;
};

inline Split split_of(int index, int bits) {
  if (index < kTables) return index / 4 - 4 > bits - 3 ? Split{kPlain, bits} : Split{index, 0};
  const int low = (index - kTables) / 4 + 1;
  return low > bits - 4 ? Split{kPlain, bits} : Split{index - 4 * low, low};
}

// Corrections of one column, pushed and popped.
class Corrections {
 public:
  explicit Corrections(int64_t most, int bits)
      : tables_(correction_tables()), bits_(bits), symbols_(most), low_(most) {
    for (int i = 0; i < kClasses; ++i) splits_[i] = split_of(i, bits);
  }

  // e (all bits of it, modulo 2^bits) of the integers with these classes.
  void push(Stack& stack, const int32_t* classes, const int32_t* e, int64_t n) {
    const int32_t half = 1 << (bits_ - 1), mask = (1 << bits_) - 1;
    for (int64_t k = 0; k < n; ++k) {
      const Split split = splits_[classes[k]];
      const int32_t centred = ((e[k] + half) & mask) - half, rounded = centred + ((1 << split.low) >> 1);
      low_[k] = uint8_t(split.low);
      symbols_[k] = 0;
      if (split.table == kPlain) continue;
      const CorrectionTable& table = tables_[split.table];
      const int32_t symbol = (rounded >> split.low) + table.reach;
      const bool inside = 0 <= symbol && symbol <= 2 * table.reach;
      symbols_[k] = uint8_t(inside ? symbol : table.escape());
      if (!inside) low_[k] = uint8_t(bits_);
    }
    stack.push(n, [&](int64_t k, uint32_t& x) {
      const int32_t rounded = low_[k] == bits_ ? e[k] : e[k] + ((1 << low_[k]) >> 1);
      stack.push_uniform(x, uint32_t(rounded) & ((1u << low_[k]) - 1), low_[k]);
    });
    stack.push(n, [&](int64_t k, uint32_t& x) {
      const int table = splits_[classes[k]].table;
      if (table != kPlain)
        stack.push_slots(x, tables_[table].start[symbols_[k]], tables_[table].frequency[symbols_[k]]);
    });
  }

  // integers[k] ← integers[k] − e.
  void pop(Stack& stack, const int32_t* classes, int32_t* integers, int64_t n) {
    const int32_t mask = (1 << bits_) - 1;
    stack.pop(n, [&](int64_t k, uint32_t& x) {
      const Split split = splits_[classes[k]];
      low_[k] = uint8_t(split.low);
      if (split.table == kPlain) return;
      const CorrectionTable& table = tables_[split.table];
      const uint32_t slot = x & (kSlots - 1);
      const int symbol = table.symbol[slot];
      x = table.frequency[symbol] * (x >> kTableBits) + slot - table.start[symbol];
      symbols_[k] = uint8_t(symbol);
      if (symbol == table.escape()) low_[k] = uint8_t(bits_);
    });
    stack.pop(n, [&](int64_t k, uint32_t& x) {
      int32_t e = int32_t(Stack::pop_uniform(x, low_[k]));
      if (low_[k] != bits_) {
        const int reach = tables_[splits_[classes[k]].table].reach;
        e += ((int32_t(symbols_[k]) - reach) << low_[k]) - ((1 << low_[k]) >> 1);
      }
      integers[k] = (integers[k] - e) & mask;
    });
  }

  void push_turn(Stack& stack, bool turned) {
    stack.push_slots(stack.states[0], turned ? kSlots - kTurned : 0, turned ? kTurned : kSlots - kTurned);
  }
  bool pop_turn(Stack& stack) {
    uint32_t& x = stack.states[0];
    const uint32_t slot = x & (kSlots - 1);
    const bool turned = slot >= kSlots - kTurned;
    x = turned ? kTurned * (x >> kTableBits) + slot - (kSlots - kTurned)
               : (kSlots - kTurned) * (x >> kTableBits) + slot;
    stack.refill(x);
    return turned;
  }

 private:
  const std::vector<CorrectionTable>& tables_;
  const int bits_;
  Split splits_[kClasses];
  std::vector<uint8_t> symbols_, low_;
};

}  // namespace gaugekit::bitsback
