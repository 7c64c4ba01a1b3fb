// What decoding a slot needs, in two forms: one number a slot, and, for at most 32 symbols, one bucket of
// docs/format.md a register lane.
#pragma once

#include <cstdint>
#include <cstring>

#include "rans_format.h"

namespace gaugekit::rans {

constexpr int kRegisterSymbols = 32;

// The buckets in 16-bit lanes, for frequencies up to kMostOfHalves. Behind the entries of the buckets' first
// symbols stand those of their second.
constexpr int kMostOfHalves = 2048;
struct alignas(64) HalfTable {
  uint16_t last[kRegisterSymbols];          // slot of the first symbol
  uint16_t frequency[2][kRegisterSymbols];  // * 16
  uint16_t rank[2][kRegisterSymbols];       // - slot
  uint16_t symbol[2][kRegisterSymbols];     // << symbol_place
};

struct alignas(64) DecoderTable {
  uint32_t before[16];  // vector loads may read three entries before `slot` and behind it
  // (frequency - 1) << 20 | rank << 8 | symbol
  uint32_t slot[kSlots];
  // (divider - 1) << 25 | (second symbol << 8 | first symbol) << symbol_place: whether (x mod 128) << 25 is
  // above it says which.
  uint32_t bucket[kRegisterSymbols];
  // (rank - position in the bucket) << 16 | frequency, for the first and the second symbol
  uint32_t part[2][kRegisterSymbols];
  HalfTable halves;
  // The same without vectors: a load is cheaper than a shift and a mask.
  uint8_t symbol_of[kSlots];
  uint16_t rank_of[kSlots];
  uint32_t frequency_of[256];  // by symbol
};

inline void fill_portable(const Table& table, const Buckets& buckets, DecoderTable& out) {
  uint32_t rank[kMaxSymbols] = {};
  for (int i = 0; i < table.size; ++i) out.frequency_of[table.symbol[i]] = table.frequency[i];
  each_run(buckets, [&](int i, int first, int slots) {
    std::memset(out.symbol_of + first, table.symbol[i], slots);
    for (int k = 0; k < slots; ++k) out.rank_of[first + k] = uint16_t(rank[i] + k);
    rank[i] += slots;
  });
}

inline void fill_slots(const Table& table, const Buckets& buckets, DecoderTable& out) {
  uint32_t rank[kMaxSymbols] = {};
  each_run(buckets, [&](int i, int first, int slots) {
    uint32_t value = uint32_t(table.frequency[i] - 1) << 20 | rank[i] << 8 | table.symbol[i];
    for (int k = 0; k < slots; ++k) out.slot[first + k] = value + (uint32_t(k) << 8);
    rank[i] += slots;
  });
}

// Calls put(bucket, divider, first, second, rank of first, rank of second less the divider).
template <class Put>
void each_bucket(const Table& table, const Buckets& b, Put put) {
  uint32_t rank[kMaxSymbols] = {};
  for (int i = 0; i < kRegisterSymbols; ++i) {
    // A bucket whose first part is empty is all its alias; one whose second part is empty never looks there.
    const int divider = b.divider[i] ? b.divider[i] : b.width, first = b.divider[i] ? i : b.alias[i];
    const int second = divider < b.width ? b.alias[i] : first;
    const uint32_t first_rank = rank[first];
    rank[first] += divider;
    put(i, divider, first, second, first_rank, rank[second] - divider);
    rank[second] += b.width - divider;
  }
}

// `place` is where the symbols' lowest bits stand in `bucket`, 0 to 8.
inline void fill_registers(const Table& table, const Buckets& b, int place, DecoderTable& out) {
  each_bucket(table, b, [&](int i, int divider, int first, int second, uint32_t rank, uint32_t second_rank) {
    const uint32_t symbols = uint32_t(table.symbol[second]) << 8 | table.symbol[first];
    out.bucket[i] = uint32_t(divider - 1) << 25 | symbols << place;
    out.part[0][i] = rank << 16 | table.frequency[first];
    out.part[1][i] = second_rank << 16 | table.frequency[second];
  });
}

inline void fill_halves(const Table& table, const Buckets& b, int place, HalfTable& out) {
  each_bucket(table, b, [&](int i, int divider, int first, int second, uint32_t rank, uint32_t second_rank) {
    const int slot = i * b.width;
    out.last[i] = uint16_t(slot + divider - 1);
    out.frequency[0][i] = uint16_t(table.frequency[first] * 16);
    out.frequency[1][i] = uint16_t(table.frequency[second] * 16);
    out.rank[0][i] = uint16_t(rank - slot), out.rank[1][i] = uint16_t(second_rank - slot);
    out.symbol[0][i] = uint16_t(table.symbol[first] << place);
    out.symbol[1][i] = uint16_t(table.symbol[second] << place);
  });
}

// The words of one segment not yet read. 64 bytes (the most that a group takes) may be read while next <=
// safe; before the section's end a copy of what is left is read instead, with zeros behind it.
struct Words {
  static constexpr int64_t kGroupBytes = 2 * kSegmentLanes;
  const uint8_t* next;
  const uint8_t* end;
  const uint8_t* safe;
  bool copied = false;
  uint8_t rest[3 * kGroupBytes];

  void open(const uint8_t* p, uint64_t words) {
    next = p;
    end = p + 2 * words;
    safe = next;
    if (2 * words >= uint64_t(kGroupBytes))
      safe = end - kGroupBytes;
    else
      copy_rest();
  }
  // False if the words ran out.
  bool prepare() {
    if (next <= safe) return true;
    if (copied) return false;
    copy_rest();
    return true;
  }

 private:
  void copy_rest() {
    const size_t left = size_t(end - next);
    std::memset(rest, 0, sizeof(rest));
    std::memcpy(rest, next, left);
    next = rest;
    safe = end = rest + left;
    copied = true;
  }
};

// How a decoded group leaves: as symbols, or as elements of two bytes, merged with their plane.
enum class Output { symbols, exponent16, high16, exponent_and_two };

constexpr int output_bytes(Output output) { return output == Output::symbols ? 1 : 2; }
// Where an element's symbol begins in it, for those that are a byte of the element.
constexpr int symbol_place(Output output) {
  return output == Output::exponent16 ? 7 : output == Output::high16 ? 8 : 0;
}
// Bytes of plane 0 that a group uses.
constexpr int group_plane_bytes(Output output) {
  return output == Output::symbols ? 0 : output == Output::exponent_and_two ? int(kSixBytes) : kLanes;
}

struct Decoder {
  alignas(64) uint32_t states[kLanes];
  Words words[kSegments];
  DecoderTable table;
  int shift;  // of the chunk's Table
  // Kernels that merge add kLanes * 2 bytes of the block before, for each group, to its checksum: kStep bytes
  // of each lane from `check` on.
  CrcLanes crc;
  const uint8_t* check;
};

// Decodes up to `groups` groups while words may be read, and returns how many. `plane` is plane 0 of these
// groups; nothing reads it when symbols are asked for.
using GroupsFunction = int (*)(Decoder&, int groups, const uint8_t* plane, uint8_t* out);

// The same for two chunks, as many groups of each.
struct Streams {
  const uint8_t* plane;
  uint8_t* out;
};
using PairFunction = int (*)(Decoder&, Decoder&, int groups, Streams, Streams);

}  // namespace gaugekit::rans
