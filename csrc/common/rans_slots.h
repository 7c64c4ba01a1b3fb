// One word for each of a chunk's 4096 slots, so that a lane decodes a symbol with one look; made by all
// threads of a block together, in steps between which they meet. The slots are those of the alias table of
// rans_table.h, found by prefix sums instead of one after another. Integers only; a test runs it on the
// processor.
#pragma once

#include "common/rans_lane.h"

namespace gaugekit::rans {

// (frequency - 1) << 20 | symbol << 12 | what is added to the state.
struct alignas(16) SlotTable {
  uint32_t slot[kSlots];
  int shift;
};

// A step of one lane: its slot's word, and its state before a word is taken.
GAUGEKIT_HD inline uint32_t slot_step(uint32_t x, const uint32_t* slots, uint32_t& found) {
  found = slots[x & (kSlots - 1)];
  const uint32_t whole = x >> kProbabilityBits;
  return (found >> 20) * whole + (whole + (found & 0xfff));
}

GAUGEKIT_HD inline uint32_t slot_symbol(uint32_t found) { return found >> 12 & 0xff; }

// An element of models 0 and 1 from its slot's word and its planes' bytes.
template <int width, int model>
GAUGEKIT_HD inline uint32_t element_of(uint32_t found, const uint32_t* raw) {
  if constexpr (width == 2 && model == kExponent) {
    // The byte twice: its mantissa stays below, its sign comes from above. The upper half is no part of it.
    return select_bits(raw[0] * 0x101u, found >> 5, 0xffff807fu);
  } else {
    uint32_t y = slot_symbol(found) << (8 * width - 8);
    for (int plane = 0; plane < width - 1; ++plane) y |= raw[plane] << 8 * plane;
    if constexpr (model == kHighByte) return y;
    constexpr uint32_t sign = 1u << (8 * width - 1), mantissa = (sign >> 8) - 1;
    return (y << 8 & sign) | (y >> 1 & (sign - 1 - mantissa)) | (y & mantissa);
  }
}

// What the threads share while they make the table. A bucket below its width is filled from the ones above
// it, both taken from the last to the first: `missing` and `spare` are the sums over those up to one of them.
struct SlotMaker {
  int count, width_log2, smalls, larges;
  uint16_t frequency[kMaxSymbols], divider[kMaxSymbols], place[kMaxSymbols];
  uint16_t missing[kMaxSymbols], spare[kMaxSymbols];
  uint8_t symbol[kMaxSymbols], alias[kMaxSymbols], small[kMaxSymbols], large[kMaxSymbols];
  uint32_t word[2][kMaxSymbols];

  GAUGEKIT_HD int width() const { return 1 << width_log2; }
};

// Sizes, and the shift of model 2; true where the symbols do not ascend or are too large.
GAUGEKIT_HD inline bool read_slots(const uint8_t* pairs, int size, int model, int thread, int threads,
                                   SlotMaker& m, SlotTable& table) {
  bool bad = false;
  if (thread == 0) {
    int log2 = 5;
    while (1 << log2 < size) ++log2;
    m.count = 1 << log2;
    m.width_log2 = kProbabilityBits - log2;
    m.smalls = m.larges = table.shift = 0;
    for (int i = 0; model == kExponentAndTwo && i < size && i <= kZeroSymbols; ++i) {
      const int symbol = load<uint16_t>(pairs + 4 * i);
      if (symbol < kZeroSymbols) continue;
      table.shift = symbol / 4 * 4 - kZeroSymbols;
      break;
    }
  }
  for (int i = thread; i < size; i += threads) {
    const int symbol = load<uint16_t>(pairs + 4 * i), before = i ? load<uint16_t>(pairs + 4 * i - 4) : -1;
    bad |= symbol <= before || symbol >= (model == kExponentAndTwo ? 1024 : 256);
  }
  return bad;
}

// Symbols and frequencies; true where one does not fit.
GAUGEKIT_HD inline bool read_frequencies(const uint8_t* pairs, int size, int thread, int threads,
                                         SlotMaker& m, const SlotTable& table) {
  bool bad = false;
  for (int i = thread; i < m.count; i += threads) {
    const int symbol = i < size ? load<uint16_t>(pairs + 4 * i) : 0;
    const int code = symbol < kZeroSymbols ? symbol : symbol - table.shift;
    const int frequency = i < size ? load<uint16_t>(pairs + 4 * i + 2) : 0;
    bad |= code > 255 || frequency > int(kSlots) || (i < size && frequency == 0);
    m.symbol[i] = uint8_t(code);
    m.frequency[i] = uint16_t(frequency);
  }
  return bad;
}

// Each bucket's place among those below or above the width; true where the frequencies do not sum to 4096.
GAUGEKIT_HD inline bool order_buckets(int thread, int threads, SlotMaker& m) {
  bool bad = false;
  const int width = m.width();
  for (int i = thread; i < m.count; i += threads) {
    const int own = m.frequency[i];
    int smalls = 0, larges = 0, missing = 0, spare = 0;
    for (int other = m.count - 1; other > i; --other) {
      const int rest = m.frequency[other] - width;
      smalls += rest < 0, missing += rest < 0 ? -rest : 0;
      larges += rest > 0, spare += rest > 0 ? rest : 0;
    }
    if (own < width) {
      m.place[i] = uint16_t(smalls);
      m.small[smalls++] = uint8_t(i);
      m.missing[smalls - 1] = uint16_t(missing += width - own);
    } else if (own > width) {
      m.place[i] = uint16_t(larges);
      m.large[larges++] = uint8_t(i);
      m.spare[larges - 1] = uint16_t(spare += own - width);
    }
    if (i > 0) continue;
    m.smalls = smalls, m.larges = larges;
    bad = missing != spare;
  }
  return bad;
}

// The first of `size` ascending sums that is at least `least`.
GAUGEKIT_HD inline int first_at_least(const uint16_t* sums, int size, int least) {
  int low = 0;
  while (low < size) {
    const int middle = (low + size) / 2;
    if (sums[middle] < least)
      low = middle + 1;
    else
      size = middle;
  }
  return low;
}

// Which symbol fills the rest of each bucket.
GAUGEKIT_HD inline void find_aliases(int thread, int threads, SlotMaker& m) {
  const int width = m.width();
  for (int i = thread; i < m.count; i += threads) {
    const int own = m.frequency[i], at = m.place[i];
    int divider = width, alias = i;
    if (own < width) {
      divider = own;
      const int before = at ? m.missing[at - 1] : 0;
      alias = m.large[first_at_least(m.spare, m.larges, before + 1)];
    } else if (own > width) {
      // Once those below have taken more than it and those before it can spare, the next one fills it.
      const int taken = m.missing[first_at_least(m.missing, m.smalls, m.spare[at])];
      if (taken > m.spare[at]) divider = width + m.spare[at] - taken, alias = m.large[at + 1];
    }
    m.divider[i] = uint16_t(divider);
    m.alias[i] = uint8_t(alias);
  }
}

// The words of both parts of each bucket, less the slot's place in it.
GAUGEKIT_HD inline void make_words(int thread, int threads, SlotMaker& m) {
  const int width = m.width();
  for (int i = thread; i < m.count; i += threads) {
    const int second = m.alias[i];
    int first_rank = 0, second_rank = second < i ? m.divider[second] : 0;
    for (int other = 0; other < i; ++other) {
      const int rest = width - m.divider[other];
      if (m.alias[other] == i) first_rank += rest;
      if (m.alias[other] == second) second_rank += rest;
    }
    m.word[0][i] = uint32_t(m.frequency[i] - 1) << 20 | uint32_t(m.symbol[i]) << 12 | uint32_t(first_rank);
    m.word[1][i] = (uint32_t(m.frequency[second] - 1) << 20 | uint32_t(m.symbol[second]) << 12) +
                   uint32_t(second_rank - m.divider[i]);
  }
}

// Four slots at a time, which lie in one bucket.
GAUGEKIT_HD inline void fill_slots(int thread, int threads, const SlotMaker& m, SlotTable& table) {
  for (int slot = 4 * thread; slot < int(kSlots); slot += 4 * threads) {
    const int i = slot >> m.width_log2, place = slot & (m.width() - 1), divider = m.divider[i];
    const uint32_t first = m.word[0][i], second = m.word[1][i];
    for (int k = 0; k < 4; ++k)
      table.slot[slot + k] = (place + k < divider ? first : second) + uint32_t(place + k);
  }
}

// All steps in their order. meet(bad) waits for every thread and says whether any of them found a fault.
template <class Meet>
GAUGEKIT_DEVICE inline bool make_slots(const uint8_t* pairs, int size, int model, int thread, int threads,
                                       SlotMaker& m, SlotTable& table, Meet meet) {
  if (meet(read_slots(pairs, size, model, thread, threads, m, table))) return false;
  if (meet(read_frequencies(pairs, size, thread, threads, m, table))) return false;
  if (meet(order_buckets(thread, threads, m))) return false;
  find_aliases(thread, threads, m);
  meet(false);
  make_words(thread, threads, m);
  meet(false);
  fill_slots(thread, threads, m, table);
  meet(false);
  return true;
}

}  // namespace gaugekit::rans
