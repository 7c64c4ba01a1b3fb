// One chunk of a coded blob to elements: portable C++, bounds-checked, free of torch and of exceptions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rans_format.h"
#include "rans_planes.h"

namespace gaugekit::rans {

// What decoding a slot needs: the frequency of its symbol, its rank among that symbol's slots, and the
// symbol.
struct Slots {
  struct {
    uint16_t frequency, rank;
  } step[kSlots];
  uint8_t symbol[kSlots];
};

inline const char* read_table(const uint8_t* p, int size, Slots& slots) {
  Table table;
  table.size = size;
  uint32_t sum = 0;
  for (int i = 0; i < size; ++i, p += 4) {
    table.symbol[i] = load<uint16_t>(p);
    table.frequency[i] = load<uint16_t>(p + 2);
    if (table.symbol[i] > 255 || (i && table.symbol[i] <= table.symbol[i - 1]))
      return "a table's symbols are not ascending bytes";
    if (table.frequency[i] == 0 || table.frequency[i] > kSlots) return "a frequency is not in 1..4096";
    sum += table.frequency[i];
  }
  if (sum != kSlots) return "a table's frequencies do not sum to 4096";
  uint8_t owner[kSlots];
  make_owners(table, owner);
  uint16_t rank[kMaxSymbols] = {};
  for (uint32_t slot = 0; slot < kSlots; ++slot) {
    const int i = owner[slot];
    slots.step[slot] = {table.frequency[i], rank[i]++};
    slots.symbol[slot] = uint8_t(table.symbol[i]);
  }
  return nullptr;
}

// The words of one segment not yet read.
struct Words {
  const uint8_t* next;
  const uint8_t* end;
};

// The state after the symbol of `slot`, before a word is read.
inline uint32_t advance(const Slots& slots, uint32_t slot, uint32_t state) {
  return slots.step[slot].frequency * (state >> kProbabilityBits) + slots.step[slot].rank;
}

// One step of one lane. The caller knows that a word is left; whether it is taken is a mask, for it cannot be
// predicted.
inline uint8_t decode_step(uint32_t& state, const Slots& slots, const uint8_t*& next) {
  const uint32_t slot = state & (kSlots - 1);
  const int64_t x = advance(slots, slot, state);
  const int64_t mask = (x - int64_t(kStateLower)) >> 63;
  const int64_t refilled = x << 16 | load<uint16_t>(next);
  state = uint32_t(x ^ ((x ^ refilled) & mask));
  next -= 2 * mask;
  return slots.symbol[slot];
}

// One step of the first `lanes` elements of a segment, checking every word.
inline bool decode_segment_checked(uint32_t* states, const Slots& slots, Words& words, int elements,
                                   uint8_t* symbols) {
  for (int lane = 0; lane < kSegmentLanes; ++lane) {
    const int e = lane_element(lane);
    if (e >= elements) continue;
    const uint32_t slot = states[lane] & (kSlots - 1);
    uint32_t x = advance(slots, slot, states[lane]);
    if (x < kStateLower) {
      if (words.next == words.end) return false;
      x = x << 16 | load<uint16_t>(words.next);
      words.next += 2;
    }
    states[lane] = x;
    symbols[e] = slots.symbol[slot];
  }
  return true;
}

// `groups` whole groups of 64 symbols, both segments side by side.
inline bool decode_groups(uint32_t* states, const Slots& slots, Words* words, int groups, uint8_t* symbols) {
  for (int g = 0; g < groups; ++g, symbols += kLanes) {
    const uint8_t* a = words[0].next;
    const uint8_t* b = words[1].next;
    if (words[0].end - a >= 2 * kSegmentLanes && words[1].end - b >= 2 * kSegmentLanes) {
      for (int odd = 0; odd < 2; ++odd)
        for (int i = 0; i < 16; ++i) {
          const int lane = 16 * odd + i, e = 2 * i + odd;
          symbols[e] = decode_step(states[lane], slots, a);
          symbols[kSegmentLanes + e] = decode_step(states[kSegmentLanes + lane], slots, b);
        }
      words[0].next = a;
      words[1].next = b;
    } else {
      for (int s = 0; s < kSegments; ++s)
        if (!decode_segment_checked(states + s * kSegmentLanes, slots, words[s], kSegmentLanes,
                                    symbols + s * kSegmentLanes))
          return false;
    }
  }
  return true;
}

// Chunk i of a blob that open_blob accepted, into `out` of symbols(i) * width bytes. Nothing but `out` is
// written.
inline const char* decode_chunk(const Blob& blob, uint64_t i, uint8_t* out) {
  const ChunkEntry e = blob.entry(i);
  const uint64_t n = blob.symbols(i), bytes = n * blob.width;
  const uint8_t* p = blob.data + e.offset;
  if (e.method == kRaw) {
    std::memcpy(out, p, bytes);
    return crc32c(out, bytes) == e.crc_decoded ? nullptr : "a raw chunk's checksum is wrong";
  }

  uint32_t states[kLanes];
  std::memcpy(states, p, sizeof(states));
  p += sizeof(states);
  for (uint32_t state : states)
    if (state < kStateLower || state >= kStateUpper) return "a state is not in [2^15, 2^31)";
  Slots slots;
  if (const char* error = read_table(p, e.symbols, slots)) return error;
  p += padded(4 * e.symbols);
  Words words[kSegments];
  for (int s = 0; s < kSegments; ++s) {
    words[s] = {p, p + 2 * uint64_t(e.words[s])};
    p += padded(2 * uint64_t(e.words[s]));
  }
  constexpr int kBlockGroups = 32, kBlock = kBlockGroups * kLanes;
  uint8_t symbols[kBlock], constants[kMaxPlanes][kBlock];
  const uint8_t* planes[kMaxPlanes] = {};
  for (int plane = blob.width - 2; plane >= 0; --plane) {
    const bool constant = e.constant >> plane & 1;
    planes[plane] = p;
    if (constant) planes[plane] = static_cast<uint8_t*>(std::memset(constants[plane], *p, kBlock));
    p += padded(constant ? 1 : n);
  }

  const MergeFunction merge_block = merger(blob.width, blob.model);
  for (uint64_t done = 0; done < n;) {
    const uint64_t block = std::min<uint64_t>(kBlock, n - done);
    if (!decode_groups(states, slots, words, int(block / kLanes), symbols))
      return "a segment's words run out";
    const int rest = int(block % kLanes);
    for (int s = 0; rest && s < kSegments; ++s)
      if (!decode_segment_checked(states + s * kSegmentLanes, slots, words[s], rest - s * kSegmentLanes,
                                  symbols + block - rest + s * kSegmentLanes))
        return "a segment's words run out";
    merge_block(symbols, planes, block, out + done * blob.width);
    done += block;
    for (int plane = 0; plane < blob.width - 1; ++plane)
      if (!(e.constant >> plane & 1)) planes[plane] += block;
  }
  for (uint32_t state : states)
    if (state != kStateLower) return "a segment does not end in the state it began with";
  for (const Words& w : words)
    if (w.next != w.end) return "a segment's words are not used up";
  return crc32c(out, bytes) == e.crc_decoded ? nullptr : "a chunk's checksum is wrong";
}

// The part of chunk i inside elements [start, stop), into `out`, which begins at element `start`.
inline const char* decode_overlap(const Blob& blob, uint64_t i, uint64_t start, uint64_t stop, uint8_t* out) {
  const uint64_t first = blob.first(i), last = first + blob.symbols(i), width = blob.width;
  if (start <= first && last <= stop) return decode_chunk(blob, i, out + (first - start) * width);
  std::vector<uint8_t> whole(blob.symbols(i) * width);
  if (const char* error = decode_chunk(blob, i, whole.data())) return error;
  const uint64_t from = std::max(start, first), to = std::min(stop, last);
  std::memcpy(out + (from - start) * width, whole.data() + (from - first) * width, (to - from) * width);
  return nullptr;
}

}  // namespace gaugekit::rans
