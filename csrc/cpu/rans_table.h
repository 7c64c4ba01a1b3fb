// Probabilities and slots of docs/format.md: 12-bit frequencies from counts, and the alias table that says
// which symbol owns each of the 4096 slots. Integers only, so every machine makes the same table.
#pragma once

#include <cstdint>
#include <cstring>

namespace gaugekit::rans {

constexpr int kProbabilityBits = 12;
constexpr uint32_t kSlots = 1u << kProbabilityBits;
constexpr uint32_t kStateLower = 1u << 15;
constexpr uint32_t kStateUpper = 1u << 31;
constexpr int kSegments = 2;
constexpr int kSegmentLanes = 32;
constexpr int kLanes = kSegments * kSegmentLanes;
constexpr int kMaxSymbols = 256;

// The symbols of one chunk, ascending, each with a frequency of 1 to 4096; the frequencies sum to 4096.
struct Table {
  int size = 0;
  uint16_t symbol[kMaxSymbols];
  uint16_t frequency[kMaxSymbols];
};

// Element of a segment's 32 that a lane codes: two vectors of 16 lanes hold even and odd elements, so that
// packing their symbols is one shift and one or.
constexpr int lane_element(int lane) { return 2 * (lane % 16) + lane / 16; }

// Frequencies for `counts` that sum to `total` > 0: floors, then single steps where they cost least (or gain
// most) bits. The derivative of count * log2(frequency) is compared as the fraction count / (2 * frequency -+
// 1).
inline void normalize(const uint32_t (&counts)[256], uint64_t total, Table& table) {
  uint64_t count[kMaxSymbols];
  uint32_t f[kMaxSymbols], sum = 0;
  table.size = 0;
  for (int s = 0; s < 256; ++s) {
    if (counts[s] == 0) continue;
    const int i = table.size++;
    table.symbol[i] = uint16_t(s);
    count[i] = counts[s];
    f[i] = uint32_t(count[i] * kSlots / total);
    if (f[i] == 0) f[i] = 1;
    sum += f[i];
  }
  for (; sum > kSlots; --sum) {
    int best = -1;
    for (int i = 0; i < table.size; ++i)
      if (f[i] > 1 && (best < 0 || count[i] * (2 * f[best] - 1) < count[best] * (2 * f[i] - 1))) best = i;
    --f[best];
  }
  for (; sum < kSlots; ++sum) {
    int best = 0;
    for (int i = 1; i < table.size; ++i)
      if (count[i] * (2 * f[best] + 1) > count[best] * (2 * f[i] + 1)) best = i;
    ++f[best];
  }
  for (int i = 0; i < table.size; ++i) table.frequency[i] = uint16_t(f[i]);
}

// owner[slot]: the index in `table` of the symbol that owns the slot. Buckets of equal width; a bucket's
// first divider[b] slots belong to symbol b, the others to alias[b].
inline void make_owners(const Table& table, uint8_t (&owner)[kSlots]) {
  int buckets = 32;
  while (buckets < table.size) buckets *= 2;
  const int width = int(kSlots) / buckets;
  int rest[kMaxSymbols], alias[kMaxSymbols], divider[kMaxSymbols], small[kMaxSymbols], large[kMaxSymbols];
  int smalls = 0, larges = 0;
  for (int b = 0; b < buckets; ++b) {
    rest[b] = b < table.size ? table.frequency[b] : 0;
    alias[b] = b;
    divider[b] = width;
    if (rest[b] < width) small[smalls++] = b;
    if (rest[b] > width) large[larges++] = b;
  }
  while (smalls) {
    const int s = small[--smalls], l = large[larges - 1];
    divider[s] = rest[s];
    alias[s] = l;
    rest[l] -= width - rest[s];
    if (rest[l] <= width) --larges;
    if (rest[l] < width) small[smalls++] = l;
  }
  for (int b = 0; b < buckets; ++b) {
    std::memset(owner + b * width, b, divider[b]);
    std::memset(owner + b * width + divider[b], alias[b], width - divider[b]);
  }
}

}  // namespace gaugekit::rans
