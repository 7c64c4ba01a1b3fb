// A chunk as the GPU decodes it (common/rans_lane.h, rans_slots.h), with the lanes of a warp one after
// another. It is there to test that code; rans_decoder.h is the fast way. Free of torch and of exceptions.
#pragma once

#include <memory>

#include "common/rans_slots.h"

namespace gaugekit::rans {

// Buckets, or where `slots` is one word a slot.
struct DecodeLanes {
  const ChunkRow& row;
  const Sections& sections;
  const LaneTable& table;
  const SlotTable* slots;
  uint8_t* out;

  uint32_t step(uint32_t x, uint32_t& symbol) const {
    if (!slots) return lane_step(x, table, symbol);
    uint32_t found;
    x = slot_step(x, slots->slot, found);
    symbol = slot_symbol(found);
    return x;
  }

  template <int width, int model>
  bool kind() const {
    bool good = true;
    for (int segment = 0; segment < kSegments; ++segment) good &= decode<width, model>(segment);
    return good;
  }

  template <int width, int model>
  bool decode(int segment) const {
    const uint32_t words = row.words[segment];
    const int shift = slots ? slots->shift : table.shift;
    uint32_t x[kSegmentLanes], next = 0;
    std::memcpy(x, sections.states + 4 * kSegmentLanes * segment, sizeof(x));
    for (uint32_t group = 0; group < row.to; group += kLanes) {
      uint32_t symbol[kSegmentLanes], refills = 0;
      for (int lane = 0; lane < kSegmentLanes; ++lane) {
        if (group + segment * kSegmentLanes + lane_element(lane) >= row.n) continue;
        x[lane] = step(x[lane], symbol[lane]);
        refills |= uint32_t(x[lane] < kStateLower) << lane;
      }
      for (int lane = 0; lane < kSegmentLanes; ++lane) {
        const uint32_t e = group + segment * kSegmentLanes + lane_element(lane);
        const uint32_t before = __builtin_popcount(refills & ((1u << lane) - 1));
        if (refills >> lane & 1) x[lane] = x[lane] << 16 | word_at(sections, segment, next + before, words);
        if (e < row.n && row.from <= e && e < row.to)
          store_element<width>(out, e - row.from,
                               lane_element_bits<width, model>(row, sections, e, symbol[lane], shift));
      }
      next += __builtin_popcount(refills);
    }
    bool good = true;
    for (uint32_t state : x) good &= state == kStateLower;
    return row.to < row.n || (good && next == words);
  }
};

// The slots as the threads of one block make them, a step after another; false where one found a fault.
inline bool make_slots_in_turn(const uint8_t* pairs, int size, int model, SlotMaker& m, SlotTable& table) {
  constexpr int threads = kLanes;
  bool bad = false;
  for (int t = 0; t < threads; ++t) bad |= read_slots(pairs, size, model, t, threads, m, table);
  for (int t = 0; t < threads && !bad; ++t) bad |= read_frequencies(pairs, size, t, threads, m, table);
  if (bad) return false;
  for (int t = 0; t < threads; ++t) bad |= order_buckets(t, threads, m);
  if (bad) return false;
  for (int t = 0; t < threads; ++t) find_aliases(t, threads, m);
  for (int t = 0; t < threads; ++t) make_words(t, threads, m);
  for (int t = 0; t < threads; ++t) fill_slots(t, threads, m, table);
  return true;
}

// False for a row that contradicts the sizes, or a chunk that does not end as a sound one does. Only what the
// row names of `out` is written.
inline bool decode_row(const ChunkRow& row, const uint8_t* packed, uint64_t packed_bytes, uint8_t* out,
                       uint64_t out_bytes, bool by_slots) {
  Sections sections{};
  if (!place_sections(row, packed + row.in, packed_bytes, out_bytes, sections)) return false;
  out += row.out;
  if (row.method == kRaw) {
    std::memcpy(out, packed + row.in + uint64_t(row.from) * row.width,
                uint64_t(row.to - row.from) * row.width);
    return true;
  }
  const auto table = std::make_unique<LaneTable>();
  const auto slots = std::make_unique<SlotTable>();
  if (by_slots) {
    const auto maker = std::make_unique<SlotMaker>();
    if (!make_slots_in_turn(sections.table, row.symbols, row.model, *maker, *slots)) return false;
  } else {
    const auto symbols = std::make_unique<Table>();
    const auto buckets = std::make_unique<Buckets>();
    if (read_table(sections.table, row.symbols, row.model, *symbols)) return false;
    make_buckets(*symbols, *buckets);
    fill_lanes(*symbols, *buckets, *table);
  }
  DecodeLanes lanes{row, sections, *table, by_slots ? slots.get() : nullptr, out};
  return with_lane_kind(row, lanes);
}

}  // namespace gaugekit::rans
