// Elements of one chunk to its coded bytes: portable C++, free of torch and of exceptions.
#pragma once

#include <cstdint>
#include <vector>

#include "rans_format.h"
#include "rans_planes.h"

namespace gaugekit::rans {

// What coding one symbol needs. A state x < 2^19 * frequency divides by the frequency through `reciprocal` =
// ceil(2^43 / frequency): the product stays below 2^63 and its error below 1 / frequency, so the quotient is
// exact.
struct SymbolCode {
  uint64_t reciprocal;
  uint32_t limit;
  uint16_t frequency;
  uint16_t start;
};

// Both tables of a chunk. Symbol s owns slot_of[start .. start + frequency), ascending.
struct Codes {
  SymbolCode symbol[256];
  uint16_t slot_of[kSlots];
};

// Buffers that one thread uses again for chunk after chunk.
struct EncoderScratch {
  std::vector<uint8_t> symbols, planes[kMaxPlanes];
  std::vector<uint16_t> words[kSegments];

  void reserve(uint64_t n, int width) {
    symbols.resize(n);
    for (int plane = 0; plane < width - 1; ++plane) planes[plane].resize(n);
    for (int s = 0; s < kSegments; ++s) words[s].resize(segment_symbols(n, s) + 1);
  }
};

// Whether a word is written is a mask, for it cannot be predicted: the word is stored in any case, and kept
// or not.
inline void encode_step(uint32_t& state, uint8_t symbol, const Codes& codes, uint16_t*& words) {
  const SymbolCode& code = codes.symbol[symbol];
  const int64_t mask = (int64_t(code.limit) - 1 - int64_t(state)) >> 63;
  words[-1] = uint16_t(state);
  words += mask;
  const uint32_t x = state >> (mask & 16);
  const uint32_t quotient = uint32_t((x * code.reciprocal) >> 43);
  state = quotient << kProbabilityBits | codes.slot_of[code.start + x - quotient * code.frequency];
}

// Runs the coder from the last symbol to the first, so that a decoder reads first to last. words[s] comes in
// as the end of a buffer with room for every symbol of the segment and one more, and leaves as the first word
// to read.
inline void encode_symbols(const uint8_t* symbols, uint64_t n, const Codes& codes, uint32_t* states,
                           uint16_t** words) {
  for (int i = 0; i < kLanes; ++i) states[i] = kStateLower;
  const uint64_t whole = n - n % kLanes;
  for (int s = 0; s < kSegments; ++s) {
    uint32_t* state = states + s * kSegmentLanes;
    const uint8_t* segment = symbols + s * kSegmentLanes;
    uint16_t* next = words[s];
    for (int lane = kSegmentLanes - 1; lane >= 0; --lane) {
      const uint64_t e = whole + lane_element(lane);
      if (e + s * kSegmentLanes < n) encode_step(state[lane], segment[e], codes, next);
    }
    for (uint64_t group = whole; group;) {
      group -= kLanes;
      for (int odd = 1; odd >= 0; --odd)
        for (int i = 15; i >= 0; --i)
          encode_step(state[16 * odd + i], segment[group + 2 * i + odd], codes, next);
    }
    words[s] = next;
  }
}

inline void count_symbols(const uint8_t* symbols, uint64_t n, uint32_t (&counts)[256]) {
  uint32_t parts[4][256] = {};  // four, so that runs of one symbol do not wait for their own stores
  uint64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint64_t eight = load<uint64_t>(symbols + i);
    for (int k = 0; k < 8; ++k) ++parts[k % 4][eight >> (8 * k) & 255];
  }
  for (; i < n; ++i) ++parts[0][symbols[i]];
  for (int s = 0; s < 256; ++s) counts[s] = parts[0][s] + parts[1][s] + parts[2][s] + parts[3][s];
}

inline bool is_constant(const uint8_t* p, uint64_t n) { return n < 2 || std::memcmp(p, p + 1, n - 1) == 0; }

// Copies `bytes` to `out` and fills up to a multiple of 16 with zeros; returns the end.
inline uint8_t* put_section(uint8_t* out, const void* data, uint64_t bytes) {
  std::memcpy(out, data, bytes);
  std::memset(out + bytes, 0, padded(bytes) - bytes);
  return out + padded(bytes);
}

// Codes n > 0 elements of `in` into `out`, which has room for padded(n * width) bytes; what would not be
// shorter than that is stored raw. Everything in the entry but its offset is set.
inline ChunkEntry encode_chunk(const uint8_t* in, uint64_t n, int element, int model, uint8_t* out,
                               EncoderScratch& scratch) {
  const int width = element_bytes(element);
  const uint64_t bytes = n * width;
  ChunkEntry entry{};
  entry.crc_decoded = crc32c(in, bytes);

  scratch.reserve(n, width);
  uint8_t* symbols = scratch.symbols.data();
  uint8_t* planes[kMaxPlanes];
  for (int plane = 0; plane < kMaxPlanes; ++plane) planes[plane] = scratch.planes[plane].data();
  splitter(width, model)(in, n, symbols, planes);
  uint32_t counts[256];
  count_symbols(symbols, n, counts);
  Table table;
  normalize(counts, n, table);

  uint8_t owner[kSlots];
  make_owners(table, owner);
  Codes codes;
  uint16_t filled[kMaxSymbols] = {};
  for (int i = 0, start = 0; i < table.size; start += table.frequency[i++]) {
    const uint32_t f = table.frequency[i];
    codes.symbol[table.symbol[i]] = {((uint64_t(1) << 43) + f - 1) / f, f << 19, uint16_t(f),
                                     uint16_t(start)};
  }
  for (uint32_t slot = 0; slot < kSlots; ++slot) {
    const int i = owner[slot];
    codes.slot_of[codes.symbol[table.symbol[i]].start + filled[i]++] = uint16_t(slot);
  }

  uint32_t states[kLanes];
  uint16_t* words[kSegments];
  const uint16_t* ends[kSegments];
  for (int s = 0; s < kSegments; ++s) ends[s] = words[s] = scratch.words[s].data() + scratch.words[s].size();
  encode_symbols(symbols, n, codes, states, words);

  entry.method = kCoded;
  entry.symbols = uint16_t(table.size);
  for (int plane = 0; plane < width - 1; ++plane)
    entry.constant |= uint8_t(is_constant(planes[plane], n) << plane);
  for (int s = 0; s < kSegments; ++s) entry.words[s] = uint32_t(ends[s] - words[s]);
  const uint64_t length = coded_length(entry, n, width);
  if (length >= padded(bytes)) {
    entry = ChunkEntry{0, uint32_t(padded(bytes)), 0, kRaw, 0, {0, 0}, 0, entry.crc_decoded};
    put_section(out, in, bytes);
  } else {
    entry.length = uint32_t(length);
    uint8_t* p = put_section(out, states, sizeof(states));
    uint16_t pairs[2 * kMaxSymbols];
    for (int i = 0; i < table.size; ++i) {
      pairs[2 * i] = table.symbol[i];
      pairs[2 * i + 1] = table.frequency[i];
    }
    p = put_section(p, pairs, 4 * uint64_t(table.size));
    for (int s = 0; s < kSegments; ++s) p = put_section(p, words[s], 2 * uint64_t(entry.words[s]));
    for (int plane = width - 2; plane >= 0; --plane)
      p = put_section(p, planes[plane], entry.constant >> plane & 1 ? 1 : n);
  }
  entry.crc_coded = crc32c(out, entry.length);
  return entry;
}

}  // namespace gaugekit::rans
