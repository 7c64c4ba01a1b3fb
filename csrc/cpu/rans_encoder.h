// Elements of one chunk to its coded bytes, free of torch and of exceptions. Every path makes the same bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "rans_encoder_avx2.h"
#include "rans_encoder_avx512.h"
#include "rans_encoder_table.h"
#include "rans_encoder_vbmi2.h"
#include "rans_histogram.h"
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
  const T* end() const { return data_.get() + size_; }

 private:
  std::unique_ptr<T[]> data_;
  uint64_t size_ = 0;
};

// So many chunks may be coded at once.
constexpr int kTogether = 2;

// What a chunk is made of.
struct Elements {
  const uint8_t* data;
  uint64_t count;
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

// Codes what is behind the chunk's last whole group: where each segment's coder begins, since it runs from
// the last symbol to the first, so that a decoder reads first to last.
inline Coder begin_symbols(EncoderScratch& chunk, uint64_t n) {
  for (uint32_t& state : chunk.states) state = kStateLower;
  for (int s = 0; s < kSegments; ++s) chunk.first_word[s] = chunk.words[s].end();
  const Coder c{chunk.symbols.data(), &chunk.codes, chunk.states, chunk.first_word, chunk.ahead};
  const PortableTable steps(chunk.codes);
  const uint64_t whole = n - n % kLanes;
  for (int s = 0; s < kSegments; ++s)
    for (int lane = kSegmentLanes - 1; lane >= 0; --lane) {
      const uint64_t e = whole + s * kSegmentLanes + lane_element(lane);
      if (e < n) encode_step(c.states[s * kSegmentLanes + lane], c.symbols[e], steps, c.words[s]);
    }
  return c;
}

inline void encode_groups(const Coder& c, uint64_t groups) {
  const PortableTable steps(*c.table);
  for (int s = 0; s < kSegments; ++s) {
    uint32_t* state = c.states + s * kSegmentLanes;
    const uint8_t* segment = c.symbols + s * kSegmentLanes;
    uint16_t* next = c.words[s];
    for (uint64_t group = groups * kLanes; group;) {
      group -= kLanes;
      for (int odd = 1; odd >= 0; --odd)
#pragma GCC unroll 4
        for (int i = 15; i >= 0; --i)
          encode_step(state[16 * odd + i], segment[group + 2 * i + odd], steps, next);
    }
    c.words[s] = next;
  }
}

// Codes the `groups` whole groups from c.symbols on, the last first.
inline void encode_groups(const Coder& c, uint64_t groups, Isa path) {
#ifdef GAUGEKIT_X86
  if (path >= Isa::avx512) {
    const int breaks = breaks_of(c);
    if (path >= Isa::vbmi2 && breaks <= kMostBreaks)
      return breaks <= 3 ? vbmi2::encode_groups<3>(c, groups) : vbmi2::encode_groups<kMostBreaks>(c, groups);
    return breaks <= 3             ? avx512::encode_groups<3>(c, groups)
           : breaks <= kMostBreaks ? avx512::encode_groups<kMostBreaks>(c, groups)
                                   : avx512::encode_groups<0>(c, groups);
  }
  if (path >= Isa::avx2) return avx2::encode_groups(c, groups);
#endif
  encode_groups(c, groups);
}

// What codes as many groups of each of two chunks at once; null where they are coded one by one.
using EncodePair = void (*)(const Coder&, const Coder&, uint64_t);

inline EncodePair pair_encoder(const Coder& a, const Coder& b, Isa path) {
#ifdef GAUGEKIT_X86
  const int breaks = std::max(breaks_of(a), breaks_of(b));
  if (path >= Isa::vbmi2 && breaks <= kMostBreaks)
    return breaks <= 3 ? vbmi2::encode_groups_of_two<3> : vbmi2::encode_groups_of_two<kMostBreaks>;
#endif
  return nullptr;
}

// Codes the symbols of one chunk, or of two.
inline void encode_symbols(EncoderScratch* chunks, const Elements* elements, int count, Isa path) {
  Coder coders[kTogether];
  for (int k = 0; k < count; ++k) coders[k] = begin_symbols(chunks[k], elements[k].count);
  const EncodePair pair = count == kTogether ? pair_encoder(coders[0], coders[1], path) : nullptr;
  const uint64_t both = pair ? std::min(elements[0].count, elements[1].count) / kLanes : 0;
  for (int k = 0; k < count; ++k)
    if (const uint64_t groups = elements[k].count / kLanes; groups > both)
      encode_groups(coders[k].behind(both), groups - both, path);
  if (pair) pair(coders[0], coders[1], both);
}

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

// Symbols, planes and table of elements into `scratch`, and what is known of the chunk so far into its entry.
inline ChunkEntry prepare_chunk(Elements elements, int element, int model, EncoderScratch& scratch,
                                Isa path) {
  const auto [in, n] = elements;
  const int width = element_bytes(element);
  ChunkEntry entry{};
  entry.method = kCoded;
  int shift = 0;
  if (model == kExponentAndTwo) {
    shift = table_shift(in, n);
    if (shift < 0) entry.method = kCodedByExponent, model = kExponent, shift = 0;
  }
  scratch.reserve(n, width);
  scratch.model = model;
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
  entry.symbols = uint16_t(table.size);
  return entry;
}

// The entry of a chunk whose symbols are coded; one that would not become shorter is to be stored raw.
inline ChunkEntry finish_chunk(ChunkEntry entry, uint64_t n, int width, const EncoderScratch& scratch) {
  for (int plane = 0; plane < width - 1; ++plane)
    entry.constant |= uint8_t(is_constant(scratch.planes[plane].data(), n) << plane);
  for (int s = 0; s < kSegments; ++s)
    entry.words[s] = uint32_t(scratch.words[s].end() - scratch.first_word[s]);
  const uint64_t length = coded_length(entry, n, width, scratch.model), raw = padded(n * width);
  if (length >= raw) return {0, uint32_t(raw), 0, kRaw, 0, {0, 0}, 0, entry.crc_decoded};
  entry.length = uint32_t(length);
  return entry;
}

// Codes one chunk or two, of n > 0 elements each, and keeps them in `scratch`. Everything in the entries is
// set but offsets and the coded checksums.
inline void code_chunks(const Elements* chunks, int count, int element, int model, EncoderScratch* scratch,
                        ChunkEntry* entries, Isa path) {
  for (int k = 0; k < count; ++k) entries[k] = prepare_chunk(chunks[k], element, model, scratch[k], path);
  encode_symbols(scratch, chunks, count, path);
  for (int k = 0; k < count; ++k)
    entries[k] = finish_chunk(entries[k], chunks[k].count, element_bytes(element), scratch[k]);
}

// Whether chunks are faster two at a time.
inline bool encodes_pairs(Isa path, int model) { return has_vbmi2(path) && model == kExponent; }

// Puts the chunk that `scratch` has just coded at out[0, entry.length), and its checksum into the entry.
inline void put_chunk(Elements elements, int width, const EncoderScratch& scratch, ChunkEntry& entry,
                      uint8_t* out) {
  const auto [in, n] = elements;
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
  const Elements elements{in, n};
  ChunkEntry entry;
  code_chunks(&elements, 1, element, model, &scratch, &entry, path);
  put_chunk(elements, element_bytes(element), scratch, entry, out);
  return entry;
}

}  // namespace gaugekit::rans
