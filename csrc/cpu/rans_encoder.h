// Elements of one chunk to its coded bytes, free of torch and of exceptions. Every path makes the same bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "rans_encoder_avx2.h"
#include "rans_encoder_avx512.h"
#include "rans_encoder_table.h"
#include "rans_encoder_vbmi2.h"
#include "rans_planes.h"

namespace gaugekit::rans {

// Words that a step may store before the last one that counts.
constexpr int kMostStored = 8;

// Memory of at least so many entries, which are not set: what is never used costs nothing.
template <class T>
class Buffer {
 public:
  void reserve(uint64_t n) {
    if (n > size_) data_.reset(new T[n]), size_ = n;
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T* end() { return data_.get() + size_; }

 private:
  std::unique_ptr<T[]> data_;
  uint64_t size_ = 0;
};

// What one thread uses again for chunk after chunk: buffers, and the chunk that it coded last.
struct EncoderScratch {
  Buffer<uint8_t> symbols, planes[kMaxPlanes];
  Buffer<uint16_t> words[kSegments];
  EncoderTable codes;
  Ahead ahead;  // of the chunk to be coded, set by who knows
  uint32_t states[kLanes];
  uint16_t* first_word[kSegments];
  int model;

  void reserve(uint64_t n, int width) {
    symbols.reserve(n);
    for (int plane = 0; plane < width - 1; ++plane) planes[plane].reserve(n);
    for (int s = 0; s < kSegments; ++s) words[s].reserve(segment_symbols(n, s) + kMostStored);
  }
};

// What a step without vectors needs, by symbol. A state x < 2^19 * frequency divides by the frequency through
// ceil(2^43 / frequency): the product stays below 2^63 and its error below 1 / frequency, so the quotient is
// exact.
struct PortableTable {
  uint64_t reciprocal[256];
  const uint32_t* slots[256];
  uint32_t frequency[256];
  uint32_t most[256];  // the largest state that spills no word

  explicit PortableTable(const EncoderTable& t) {
    for (int i = 0; i < t.table.size; ++i) {
      const uint32_t symbol = t.table.symbol[i], f = t.table.frequency[i];
      reciprocal[symbol] = ((uint64_t(1) << 43) + f - 1) / f;
      slots[symbol] = t.slot_of + (t.by_symbol[symbol] >> 16);
      frequency[symbol] = f;
      most[symbol] = (f << 19) - 1;
    }
  }
};

// Whether a word is written is a mask, for it cannot be predicted: the word is stored in any case, and kept
// or not.
GAUGEKIT_INLINE void encode_step(uint32_t& state, uint8_t symbol, const PortableTable& t, uint16_t*& words) {
  const uint32_t before = state;
  const int64_t mask = (int64_t(t.most[symbol]) - int64_t(before)) >> 63;
  words[-1] = uint16_t(before);
  words += mask;
  const uint32_t x = before ^ ((before ^ before >> 16) & uint32_t(mask));
  const uint32_t quotient = uint32_t((x * t.reciprocal[symbol]) >> 43);
  state = quotient << kProbabilityBits | t.slots[symbol][x - quotient * t.frequency[symbol]];
}

// Runs the coder from the last symbol to the first, so that a decoder reads first to last. words[s] comes in
// as the end of a buffer with room for every symbol of the segment and kMostStored more, and leaves as the
// first word to read.
inline void encode_symbols(const uint8_t* symbols, uint64_t n, const EncoderTable& table, uint32_t* states,
                           uint16_t** words, const Ahead& ahead, Isa path) {
  for (int i = 0; i < kLanes; ++i) states[i] = kStateLower;
  const PortableTable steps(table);
  const uint64_t whole = n - n % kLanes;
  for (int s = 0; s < kSegments; ++s)
    for (int lane = kSegmentLanes - 1; lane >= 0; --lane) {
      const uint64_t e = whole + s * kSegmentLanes + lane_element(lane);
      if (e < n) encode_step(states[s * kSegmentLanes + lane], symbols[e], steps, words[s]);
    }
#ifdef GAUGEKIT_X86
  if (path >= Isa::avx512) {
    const int breaks = table.table.size <= kCells ? table.cells.breaks : kMostBreaks + 1;
    if (path >= Isa::vbmi2 && breaks <= kMostBreaks) {
      const auto groups = breaks <= 3 ? vbmi2::encode_groups<3> : vbmi2::encode_groups<kMostBreaks>;
      return groups(symbols, whole / kLanes, table, states, words, ahead);
    }
    const auto groups = breaks <= 3             ? avx512::encode_groups<3>
                        : breaks <= kMostBreaks ? avx512::encode_groups<kMostBreaks>
                                                : avx512::encode_groups<0>;
    return groups(symbols, whole / kLanes, table, states, words, ahead);
  }
  if (path >= Isa::avx2) return avx2::encode_groups(symbols, whole / kLanes, table, states, words, ahead);
#endif
  for (int s = 0; s < kSegments; ++s) {
    uint32_t* state = states + s * kSegmentLanes;
    const uint8_t* segment = symbols + s * kSegmentLanes;
    uint16_t* next = words[s];
    for (uint64_t group = whole; group;) {
      group -= kLanes;
      for (int odd = 1; odd >= 0; --odd)
#pragma GCC unroll 4
        for (int i = 15; i >= 0; --i)
          encode_step(state[16 * odd + i], segment[group + 2 * i + odd], steps, next);
    }
    words[s] = next;
  }
}

// How often each symbol occurs, block by block.
class Histogram {
 public:
  explicit Histogram(Isa path) : path_(path) {}

  void add(const uint8_t* symbols, uint64_t n) {
#ifdef GAUGEKIT_X86
    if (windows_ && n % 64 == 0) {
      const auto count = path_ >= Isa::avx512 ? avx512::count_range : avx2::count_range;
      if (count(symbols, n, low_, windows_, parts_[0]) > n / 16) windows_ = 0;
      return;
    }
#endif
    uint64_t i = 0;  // four parts, so that runs of one symbol do not wait for their own stores
    for (; i + 8 <= n; i += 8) {
      const uint64_t eight = load<uint64_t>(symbols + i);
      for (int k = 0; k < 8; ++k) ++parts_[k % 4][eight >> (8 * k) & 255];
    }
    for (; i < n; ++i) ++parts_[0][symbols[i]];
    if (has_avx2(path_)) find_range();
  }

  void total(uint32_t (&counts)[256]) const {
    for (int s = 0; s < 256; ++s) counts[s] = parts_[0][s] + parts_[1][s] + parts_[2][s] + parts_[3][s];
  }

 private:
  // Counting is faster by vectors where nearly all symbols are of a few consecutive ones. Exponents are.
  void find_range() {
#ifdef GAUGEKIT_X86
    uint32_t counts[256], up_to[257] = {};
    total(counts);
    for (int s = 0; s < 256; ++s) up_to[s + 1] = up_to[s] + counts[s];
    for (int windows = 1; windows <= 4 && !windows_; ++windows) {
      const int size = windows * kWindow;
      low_ = 0;
      for (int s = 1; s <= 256 - size; ++s)
        if (up_to[s + size] - up_to[s] > up_to[low_ + size] - up_to[low_]) low_ = s;
      if (up_to[256] - (up_to[low_ + size] - up_to[low_]) <= up_to[256] / 32) windows_ = windows;
    }
    if (!windows_) path_ = Isa::portable;
#endif
  }

  Isa path_;
  int low_ = 0, windows_ = 0;
  uint32_t parts_[4][256] = {};
};

inline bool is_constant(const uint8_t* p, uint64_t n) { return n < 2 || std::memcmp(p, p + 1, n - 1) == 0; }

// Copies `bytes` to `out` and fills up to a multiple of 16 with zeros; returns the end.
inline uint8_t* put_section(uint8_t* out, const void* data, uint64_t bytes) {
  std::memcpy(out, data, bytes);
  std::memset(out + bytes, 0, padded(bytes) - bytes);
  return out + padded(bytes);
}

// The same for six bits of each byte of data[0, n); a whole number of groups is a multiple of 16 bytes.
inline uint8_t* put_six(uint8_t* out, const uint8_t* data, uint64_t n) {
  const uint64_t whole = n - n % kLanes;
  for (uint64_t i = 0; i < whole; i += kLanes, out += kSixBytes) pack_six(data + i, out);
  if (whole == n) return out;
  uint8_t last[kLanes] = {};
  std::memcpy(last, data + whole, n - whole);
  pack_six(last, out);
  return out + kSixBytes;
}

// Codes n > 0 elements of `in` and keeps them in `scratch`; a chunk that would not become shorter is to be
// stored raw. Everything in the entry is set but its offset and the coded checksum.
inline ChunkEntry code_chunk(const uint8_t* in, uint64_t n, int element, int model, EncoderScratch& scratch,
                             Isa path) {
  const int width = element_bytes(element);
  ChunkEntry entry{};
  entry.method = kCoded;
  int shift = 0;
  if (model == kExponentAndTwo) {
    shift = table_shift(in, n);
    if (shift < 0) entry.method = kCodedByExponent, model = kExponent, shift = 0;
  }
  scratch.reserve(n, width);
  uint8_t* symbols = scratch.symbols.data();
  // The elements are read from memory once: checksum, planes and histogram of a block while it is in cache.
  constexpr uint64_t kBlock = 4096;
  const SplitFunction split_block = splitter(width, model, path);
  Histogram histogram(path);
  for (uint64_t done = 0; done < n; done += kBlock) {
    const uint64_t block = std::min(kBlock, n - done);
    entry.crc_decoded = crc32c(in + done * width, block * width, entry.crc_decoded);
    uint8_t* parts[kMaxPlanes];
    for (int plane = 0; plane < kMaxPlanes; ++plane)
      parts[plane] = plane < width - 1 ? scratch.planes[plane].data() + done : nullptr;
    split_block(in + done * width, block, symbols + done, parts, shift);
    histogram.add(symbols + done, block);
  }
  uint32_t counts[256];
  histogram.total(counts);
  Table& table = scratch.codes.table;
  normalize(counts, n, table);
  table.shift = shift;
  fill(scratch.codes);

  const uint16_t* ends[kSegments];
  for (int s = 0; s < kSegments; ++s) ends[s] = scratch.first_word[s] = scratch.words[s].end();
  encode_symbols(symbols, n, scratch.codes, scratch.states, scratch.first_word, scratch.ahead, path);

  scratch.model = model;
  entry.symbols = uint16_t(table.size);
  for (int plane = 0; plane < width - 1; ++plane)
    entry.constant |= uint8_t(is_constant(scratch.planes[plane].data(), n) << plane);
  for (int s = 0; s < kSegments; ++s) entry.words[s] = uint32_t(ends[s] - scratch.first_word[s]);
  const uint64_t length = coded_length(entry, n, width, model), raw = padded(n * width);
  if (length >= raw) return {0, uint32_t(raw), 0, kRaw, 0, {0, 0}, 0, entry.crc_decoded};
  entry.length = uint32_t(length);
  return entry;
}

// Puts the chunk that `scratch` has just coded at out[0, entry.length), and its checksum into the entry.
inline void put_chunk(const uint8_t* in, uint64_t n, int width, const EncoderScratch& scratch,
                      ChunkEntry& entry, uint8_t* out) {
  if (entry.method == kRaw) {
    put_section(out, in, n * width);
  } else {
    const Table& table = scratch.codes.table;
    uint8_t* p = put_section(out, scratch.states, sizeof(scratch.states));
    uint16_t pairs[2 * kMaxSymbols];
    for (int i = 0; i < table.size; ++i) {
      pairs[2 * i] = uint16_t(table.symbol[i] + (table.symbol[i] < kZeroSymbols ? 0 : table.shift));
      pairs[2 * i + 1] = table.frequency[i];
    }
    p = put_section(p, pairs, 4 * uint64_t(table.size));
    for (int s = 0; s < kSegments; ++s)
      p = put_section(p, scratch.first_word[s], 2 * uint64_t(entry.words[s]));
    for (int plane = width - 2; plane >= 0; --plane) {
      const uint8_t* data = scratch.planes[plane].data();
      if (scratch.model == kExponentAndTwo && !entry.constant)
        p = put_six(p, data, n);
      else
        p = put_section(p, data, entry.constant >> plane & 1 ? 1 : n);
    }
  }
  entry.crc_coded = crc32c(out, entry.length);
}

// Both, for a chunk whose place is known: `out` has room for padded(n * width) bytes.
inline ChunkEntry encode_chunk(const uint8_t* in, uint64_t n, int element, int model, uint8_t* out,
                               EncoderScratch& scratch, Isa path = isa()) {
  ChunkEntry entry = code_chunk(in, n, element, model, scratch, path);
  put_chunk(in, n, element_bytes(element), scratch, entry, out);
  return entry;
}

}  // namespace gaugekit::rans
