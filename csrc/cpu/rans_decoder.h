// One chunk of a coded blob to elements, bounds-checked, free of torch and of exceptions: symbols by the
// widest kernel the processor has, merged with their planes while both are in cache. Every path gives the
// same bytes and the same errors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rans_decoder_avx2.h"
#include "rans_decoder_avx512.h"
#include "rans_decoder_table.h"
#include "rans_decoder_vbmi2.h"
#include "rans_planes.h"

namespace gaugekit::rans {

// One step of one lane. Whether a word is taken is a mask, for it cannot be predicted; the caller knows that
// one may be read.
GAUGEKIT_INLINE uint8_t decode_step(uint32_t& state, const DecoderTable& table, const uint8_t*& next) {
  const uint32_t slot = state & (kSlots - 1);
  const uint8_t symbol = table.symbol_of[slot];
  const uint32_t x = table.frequency_of[symbol] * (state >> kProbabilityBits) + table.rank_of[slot];
  const uint32_t mask = uint32_t(int32_t(x - kStateLower) >> 31), refilled = x << 16 | load<uint16_t>(next);
  state = x ^ ((x ^ refilled) & mask);
  next += mask & 2;
  return symbol;
}

inline int portable_groups(Decoder& d, int groups, const uint8_t*, uint8_t* symbols) {
  const uint8_t *a = d.words[0].next, *b = d.words[1].next;
  uint32_t* states = d.states;
  int done = 0;
  for (; done < groups && a <= d.words[0].safe && b <= d.words[1].safe; ++done, symbols += kLanes)
    for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int lane = 16 * odd + i, e = 2 * i + odd;
        symbols[e] = decode_step(states[lane], d.table, a);
        symbols[kSegmentLanes + e] = decode_step(states[kSegmentLanes + lane], d.table, b);
      }
  d.words[0].next = a;
  d.words[1].next = b;
  return done;
}

// The group at the end that is not whole: lanes whose element does not exist take no step.
inline bool decode_last_group(Decoder& d, int elements, uint8_t* symbols) {
  for (int s = 0; s < kSegments; ++s) {
    if (!d.words[s].prepare()) return false;
    for (int lane = 0; lane < kSegmentLanes; ++lane) {
      const int e = s * kSegmentLanes + lane_element(lane);
      if (e < elements)
        symbols[e] = decode_step(d.states[s * kSegmentLanes + lane], d.table, d.words[s].next);
    }
  }
  return true;
}

inline Output output_of(int width, int model) {
  if (width != 2) return Output::symbols;
  if (model == kExponentAndTwo) return Output::exponent_and_two;
  return model == kExponent ? Output::exponent16 : Output::high16;
}

template <Output output>
GroupsFunction vector_groups(Isa path, bool in_registers) {
#ifdef GAUGEKIT_X86
  if constexpr (output != Output::exponent_and_two)
    if (path >= Isa::vbmi2 && in_registers) return vbmi2::groups<output>;
  if (path >= Isa::avx512) return in_registers ? avx512::groups<true, output> : avx512::groups<false, output>;
  if (path >= Isa::avx2) return avx2::groups<output>;
#endif
  return nullptr;
}

// The kernel of `path` for elements of this kind, and in `output` what it writes.
inline GroupsFunction groups_function(Isa path, bool in_registers, int width, int model, Output& output) {
  output = has_avx2(path) ? output_of(width, model) : Output::symbols;
  if (!has_avx2(path)) return portable_groups;
  if (output == Output::exponent16) return vector_groups<Output::exponent16>(path, in_registers);
  if (output == Output::high16) return vector_groups<Output::high16>(path, in_registers);
  if (output == Output::exponent_and_two) return vector_groups<Output::exponent_and_two>(path, in_registers);
  return vector_groups<Output::symbols>(path, in_registers);
}

// One chunk of a blob that open_blob accepted, block by block, into elements. `path` must be one that this
// processor has.
class ChunkDecoder {
 public:
  // `out` has room for symbols(i) * width bytes, and nothing else is written.
  const char* open(const Blob& blob, uint64_t i, uint8_t* out, Isa path) {
    entry_ = blob.entry(i);
    count_ = blob.symbols(i), done_ = 0;
    width_ = blob.width, model_ = chunk_model(entry_, blob.model);
    out_ = out, path_ = path;
    unchecked_ = nullptr, crc_ = 0;
    const uint8_t* p = blob.data + entry_.offset;
    if (entry_.method == kRaw) return copy_raw(p);
    std::memcpy(d_.states, p, sizeof(d_.states));
    p += sizeof(d_.states);
    for (uint32_t state : d_.states)
      if (state < kStateLower || state >= kStateUpper) return "a state is not in [2^15, 2^31)";
    if (const char* error = read_tables(p)) return error;
    p += padded(4 * entry_.symbols);
    for (int s = 0; s < kSegments; ++s) {
      d_.words[s].open(p, entry_.words[s]);
      p += padded(2 * uint64_t(entry_.words[s]));
    }
    return open_planes(p);
  }

  const char* decode_rest() {
    while (done_ < count_) {
      begin_block();
      if (!decode_groups(0)) return "a segment's words run out";
      if (const char* error = end_block()) return error;
    }
    return nullptr;
  }

  const char* close() {
    if (entry_.method == kRaw) return nullptr;
    if (unchecked_) crc_ = crc32c(unchecked_, CrcLanes::kBytes, crc_);
    for (uint32_t state : d_.states)
      if (state != kStateLower) return "a segment does not end in the state it began with";
    for (const Words& w : d_.words)
      if (w.next != w.end) return "a segment's words are not used up";
    return crc_ == entry_.crc_decoded ? nullptr : "a chunk's checksum is wrong";
  }

  // The blocks that two chunks have both whole, a group of each at a time. An error is that of one of them.
  static void decode_together(ChunkDecoder& a, ChunkDecoder& b, const char*& a_error, const char*& b_error) {
    const PairFunction pair = a.together_with(b);
    while (pair && !a_error && !b_error && a.count_ - a.done_ >= kBlock && b.count_ - b.done_ >= kBlock) {
      a.begin_block(), b.begin_block();
      const int groups = pair(a.d_, b.d_, kBlockGroups, {a.planes_[0], a.place()}, {b.planes_[0], b.place()});
      a_error = a.decode_groups(groups) ? a.end_block() : "a segment's words run out";
      b_error = b.decode_groups(groups) ? b.end_block() : "a segment's words run out";
    }
  }

 private:
  static constexpr int kBlockGroups = 32, kBlock = kBlockGroups * kLanes;
  static_assert(CrcLanes::kBytes == 2 * kBlock && CrcLanes::kStep * kBlockGroups == CrcShift::kLane);

  bool six() const { return model_ == kExponentAndTwo; }
  bool merged() const { return output_ != Output::symbols; }  // else a block's symbols are merged behind it
  uint8_t* place() const { return out_ + done_ * width_; }
  bool constant(int plane) const { return entry_.constant >> plane & 1; }

  const char* copy_raw(const uint8_t* p) {
    std::memcpy(out_, p, count_ * width_);
    done_ = count_;
    return crc32c(out_, count_ * width_) == entry_.crc_decoded ? nullptr : "a raw chunk's checksum is wrong";
  }

  const char* read_tables(const uint8_t* p) {
    Table table;
    if (const char* error = read_table(p, entry_.symbols, model_, table)) return error;
    d_.shift = table.shift;
    Buckets buckets;
    make_buckets(table, buckets);
    const bool in_registers = has_avx512(path_) && table.size <= kRegisterSymbols;
    Isa path = path_;
#ifdef GAUGEKIT_X86
    for (int i = 0; i < table.size; ++i)
      if (table.frequency[i] > kMostOfHalves) path = std::min(path, Isa::avx512);
#endif
    kernel_ = groups_function(path, in_registers, width_, model_, output_);
    halves_ = in_registers && has_vbmi2(path) && output_ != Output::exponent_and_two;
    if (halves_)
      fill_halves(table, buckets, symbol_place(output_), d_.table.halves);
    else if (in_registers)
      fill_registers(table, buckets, symbol_place(output_), d_.table);
    else if (has_avx2(path_))
      fill_slots(table, buckets, d_.table);
    if (!has_avx2(path_) || count_ % kLanes) fill_portable(table, buckets, d_.table);
    merge_ = merger(width_, model_, path_);
    return nullptr;
  }

  const char* open_planes(const uint8_t* p) {
    for (int plane = 0; plane < kMaxPlanes; ++plane) planes_[plane] = nullptr;
    for (int plane = width_ - 2; plane >= 0; --plane) {
      planes_[plane] = p;
      if (constant(plane) && six() && *p >= 64) return "a constant of six bits has more";
      if (constant(plane)) planes_[plane] = static_cast<uint8_t*>(std::memset(constants_[plane], *p, kBlock));
      p += padded(constant(plane) ? 1 : plane_bytes(count_, model_));
    }
    if (six() && entry_.constant) {  // the plane is that of 64 such values, over and over
      uint8_t group[kSixBytes];
      pack_six(constants_[0], group);
      for (int g = 0; g < kBlockGroups; ++g) std::memcpy(constants_[0] + g * kSixBytes, group, kSixBytes);
    }
    return nullptr;
  }

  // A block's checksum is taken while the next one is decoded, where that one is as long: such a kernel's
  // groups have cycles left for it.
  void begin_block() {
    static constexpr uint8_t nothing[CrcLanes::kBytes] = {};
    block_ = std::min<uint64_t>(kBlock, count_ - done_);
    d_.check = unchecked_ ? unchecked_ : nothing;
    d_.crc.begin(crc_);
  }

  // The block's whole groups but the first `groups`; false if a segment's words run out.
  bool decode_groups(int groups) {
    const int whole = int(block_ / kLanes);
    while (groups < whole) {
      for (Words& w : d_.words)
        if (!w.prepare()) return false;
      const uint8_t* plane = planes_[0] + groups * group_plane_bytes(output_);
      uint8_t* to = (merged() ? place() : symbols_) + groups * kLanes * output_bytes(output_);
      groups += kernel_(d_, whole - groups, plane, to);
    }
    return true;
  }

  const char* end_block() {
    const uint64_t whole = block_ - block_ % kLanes, from = merged() ? whole : 0;
    if (whole < block_ && !decode_last_group(d_, int(block_ - whole), symbols_ + whole))
      return "a segment's words run out";
    const uint8_t* rest[kMaxPlanes];
    for (int plane = 0; plane < kMaxPlanes; ++plane)
      rest[plane] = planes_[plane] ? planes_[plane] + from : nullptr;
    if (six()) {
      for (uint64_t at = from; at < block_; at += kLanes)
        unpack_six(planes_[0] + at / kLanes * kSixBytes, unpacked_ + at);
      rest[0] = unpacked_ + from;
    }
    if (from < block_) merge_(symbols_ + from, rest, block_ - from, place() + from * width_, d_.shift);
    if (unchecked_) crc_ = whole == kBlock ? d_.crc.end() : crc32c(unchecked_, CrcLanes::kBytes, crc_);
    unchecked_ = merged() && whole == kBlock ? place() : nullptr;
    if (!unchecked_) crc_ = crc32c(place(), block_ * width_, crc_);
    done_ += block_;
    for (int plane = 0; plane < width_ - 1; ++plane)
      if (!constant(plane)) planes_[plane] += plane_bytes(block_, model_);
    return nullptr;
  }

  PairFunction together_with(const ChunkDecoder& other) const {
#ifdef GAUGEKIT_X86
    if (!halves_ || !other.halves_ || output_ != other.output_) return nullptr;
    if (output_ == Output::exponent16) return vbmi2::groups_of_two<Output::exponent16>;
    if (output_ == Output::high16) return vbmi2::groups_of_two<Output::high16>;
#endif
    return nullptr;
  }

  ChunkEntry entry_;
  uint64_t count_, done_, block_;
  int width_, model_;
  uint8_t* out_;
  Isa path_;
  Output output_;
  bool halves_ = false;
  GroupsFunction kernel_;
  MergeFunction merge_;
  const uint8_t* planes_[kMaxPlanes];
  const uint8_t* unchecked_;
  uint32_t crc_;
  Decoder d_;
  uint8_t symbols_[kBlock], unpacked_[kBlock], constants_[kMaxPlanes][kBlock];
};

// Chunk i of a blob that open_blob accepted, into `out` of symbols(i) * width bytes.
inline const char* decode_chunk(const Blob& blob, uint64_t i, uint8_t* out, Isa path = isa()) {
  ChunkDecoder chunk;
  if (const char* error = chunk.open(blob, i, out, path)) return error;
  if (const char* error = chunk.decode_rest()) return error;
  return chunk.close();
}

// Chunks i and i + 1, the second behind the first; the first one's error, if it has one.
inline const char* decode_two_chunks(const Blob& blob, uint64_t i, uint8_t* out, Isa path = isa()) {
  ChunkDecoder a, b;
  const char* a_error = a.open(blob, i, out, path);
  const char* b_error = b.open(blob, i + 1, out + blob.symbols(i) * blob.width, path);
  ChunkDecoder::decode_together(a, b, a_error, b_error);
  if (!a_error) a_error = a.decode_rest();
  if (!a_error) a_error = a.close();
  if (!b_error) b_error = b.decode_rest();
  if (!b_error) b_error = b.close();
  return a_error ? a_error : b_error;
}

// The part of chunk i inside elements [start, stop), into `out`, which begins at element `start`.
inline const char* decode_overlap(const Blob& blob, uint64_t i, uint64_t start, uint64_t stop, uint8_t* out,
                                  Isa path = isa()) {
  const uint64_t first = blob.first(i), last = first + blob.symbols(i), width = blob.width;
  if (start <= first && last <= stop) return decode_chunk(blob, i, out + (first - start) * width, path);
  std::vector<uint8_t> whole(blob.symbols(i) * width);
  if (const char* error = decode_chunk(blob, i, whole.data(), path)) return error;
  const uint64_t from = std::max(start, first), to = std::min(stop, last);
  std::memcpy(out + (from - start) * width, whole.data() + (from - first) * width, (to - from) * width);
  return nullptr;
}

// Whether chunks are faster two at a time.
inline bool decodes_pairs(Isa path) { return has_vbmi2(path); }

// The parts of chunks i and, where there is one before `last`, i + 1 inside elements [start, stop).
inline const char* decode_overlaps(const Blob& blob, uint64_t i, uint64_t last, uint64_t start, uint64_t stop,
                                   uint8_t* out, Isa path = isa()) {
  if (i + 1 >= last) return decode_overlap(blob, i, start, stop, out, path);
  const uint64_t first = blob.first(i), end = blob.first(i + 1) + blob.symbols(i + 1);
  if (start <= first && end <= stop)
    return decode_two_chunks(blob, i, out + (first - start) * blob.width, path);
  const char* error = decode_overlap(blob, i, start, stop, out, path);
  const char* second = decode_overlap(blob, i + 1, start, stop, out, path);
  return error ? error : second;
}

}  // namespace gaugekit::rans
