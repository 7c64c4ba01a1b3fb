// What coding one symbol needs.
#pragma once

#include <cstdint>

#include "rans_format.h"

namespace gaugekit::rans {

struct EncoderTable {
  Table table;
  // start << 16 | frequency, by symbol and by index in the table. The symbol owns slot_of[start .. start +
  // frequency), ascending.
  uint32_t by_symbol[256];
  uint32_t by_index[32];
  uint32_t slot_of[kSlots];
  uint32_t behind[4];  // vector loads may read three entries before a table and behind it
};

inline void fill(EncoderTable& t) {
  Buckets buckets;
  make_buckets(t.table, buckets);
  uint32_t filled[kMaxSymbols];
  std::memset(t.by_symbol, 0, sizeof(t.by_symbol));
  std::memset(t.by_index, 0, sizeof(t.by_index));
  for (uint32_t i = 0, start = 0; i < uint32_t(t.table.size); start += t.table.frequency[i++]) {
    const uint32_t code = start << 16 | t.table.frequency[i];
    t.by_symbol[t.table.symbol[i]] = code;
    if (i < 32) t.by_index[i] = code;
    filled[i] = start;
  }
  each_run(buckets, [&](int i, int first, int slots) {
    for (int k = 0; k < slots; ++k) t.slot_of[filled[i] + k] = uint32_t(first + k);
    filled[i] += slots;
  });
}

}  // namespace gaugekit::rans
