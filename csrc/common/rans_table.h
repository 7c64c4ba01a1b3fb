// Probabilities and slots of docs/format.md: 12-bit frequencies from counts, and the alias table that says
// which symbol owns each of the 4096 slots. Integers only, so every machine makes the same table. Free of
// torch, for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/select_bits.h"

namespace gaugekit::rans {

constexpr int kProbabilityBits = 12;
constexpr uint32_t kSlots = 1u << kProbabilityBits;
constexpr uint32_t kStateLower = 1u << 15;
constexpr uint32_t kStateUpper = 1u << 31;
constexpr int kSegments = 2;
constexpr int kSegmentLanes = 32;
constexpr int kLanes = kSegments * kSegmentLanes;
constexpr int kMaxSymbols = 256;
// Model 2: symbols of 10 bits, of which a chunk uses the four of exponent 0 and those of 63 exponents in a
// row.
constexpr int kZeroSymbols = 4;
constexpr int kMaxExponents = 63;
constexpr uint64_t kSixBytes = 48;  // of 64 six-bit remainders

enum Model : uint8_t { kExponent = 0, kHighByte = 1, kExponentAndTwo = 2 };
enum Method : uint8_t { kRaw = 0, kCoded = 1, kCodedByExponent = 2 };

template <class T>
GAUGEKIT_HD T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

GAUGEKIT_HD constexpr uint64_t padded(uint64_t bytes) { return (bytes + 15) & ~uint64_t(15); }

// The symbols of one chunk, ascending, each with a frequency of 1 to 4096; the frequencies sum to 4096. A
// symbol of 10 bits is held as a byte: itself below kZeroSymbols, else less `shift`.
struct Table {
  int size = 0;
  int shift = 0;
  uint16_t symbol[kMaxSymbols];
  uint16_t frequency[kMaxSymbols];
};

// Element of a segment's 32 that a lane codes: two vectors of 16 lanes hold even and odd elements, so that
// packing their symbols is one shift and one or.
GAUGEKIT_HD constexpr int lane_element(int lane) { return 2 * (lane % 16) + lane / 16; }

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

// Reads and checks the K pairs at `p`.
GAUGEKIT_HD inline const char* read_table(const uint8_t* p, int size, int model, Table& table) {
  table.size = size;
  table.shift = 0;
  uint32_t sum = 0;
  for (int i = 0, before = -1; i < size; ++i, p += 4) {
    const int symbol = load<uint16_t>(p);
    if (symbol <= before || symbol >= (model == kExponentAndTwo ? 1024 : 256))
      return "a table's symbols are not ascending, or too large";
    if (model == kExponentAndTwo && symbol >= kZeroSymbols && before < kZeroSymbols)
      table.shift = symbol / 4 * 4 - kZeroSymbols;
    before = symbol;
    const int code = symbol < kZeroSymbols ? symbol : symbol - table.shift;
    if (code > 255) return "a table's exponents are too far apart";
    table.symbol[i] = uint16_t(code);
    table.frequency[i] = load<uint16_t>(p + 2);
    if (table.frequency[i] == 0 || table.frequency[i] > kSlots) return "a frequency is not in 1..4096";
    sum += table.frequency[i];
  }
  return sum == kSlots ? nullptr : "a table's frequencies do not sum to 4096";
}

// Walker's aliases: `count` buckets of `width` slots; a bucket's first divider[b] slots belong to symbol b of
// the table, the others to symbol alias[b].
struct Buckets {
  int count, width;
  int16_t divider[kMaxSymbols], alias[kMaxSymbols];
  int16_t rest[kMaxSymbols], small[kMaxSymbols], large[kMaxSymbols];  // used while they are made
};

GAUGEKIT_HD inline void make_buckets(const Table& table, Buckets& b) {
  b.count = 32;
  while (b.count < table.size) b.count *= 2;
  b.width = int(kSlots) / b.count;
  int smalls = 0, larges = 0;
  for (int i = 0; i < b.count; ++i) {
    b.rest[i] = int16_t(i < table.size ? table.frequency[i] : 0);
    b.alias[i] = int16_t(i);
    b.divider[i] = int16_t(b.width);
    if (b.rest[i] < b.width) b.small[smalls++] = int16_t(i);
    if (b.rest[i] > b.width) b.large[larges++] = int16_t(i);
  }
  while (smalls) {
    const int s = b.small[--smalls], l = b.large[larges - 1];
    b.divider[s] = b.rest[s];
    b.alias[s] = int16_t(l);
    b.rest[l] = int16_t(b.rest[l] - (b.width - b.rest[s]));
    if (b.rest[l] <= b.width) --larges;
    if (b.rest[l] < b.width) b.small[smalls++] = int16_t(l);
  }
}

// Calls run(symbol index, first slot, slots) for every run of slots that one symbol owns, in the order of the
// slots.
template <class Run>
void each_run(const Buckets& b, Run run) {
  for (int i = 0; i < b.count; ++i) {
    const int first = i * b.width;
    if (b.divider[i]) run(i, first, b.divider[i]);
    if (b.divider[i] < b.width) run(b.alias[i], first + b.divider[i], b.width - b.divider[i]);
  }
}

}  // namespace gaugekit::rans
