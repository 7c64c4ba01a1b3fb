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
  output = path == Isa::portable ? Output::symbols : output_of(width, model);
  if (path == Isa::portable) return portable_groups;
  if (output == Output::exponent16) return vector_groups<Output::exponent16>(path, in_registers);
  if (output == Output::high16) return vector_groups<Output::high16>(path, in_registers);
  if (output == Output::exponent_and_two) return vector_groups<Output::exponent_and_two>(path, in_registers);
  return vector_groups<Output::symbols>(path, in_registers);
}

// `groups` whole groups; false if a segment's words run out.
inline bool decode_groups(Decoder& d, GroupsFunction kernel, int groups, const uint8_t* plane, uint8_t* out,
                          Output output) {
  while (groups) {
    for (Words& w : d.words)
      if (!w.prepare()) return false;
    const int done = kernel(d, groups, plane, out);
    groups -= done;
    plane += done * group_plane_bytes(output);
    out += done * kLanes * output_bytes(output);
  }
  return true;
}

// Chunk i of a blob that open_blob accepted, into `out` of symbols(i) * width bytes. Nothing but `out` is
// written. `path` must be one that this processor has.
inline const char* decode_chunk(const Blob& blob, uint64_t i, uint8_t* out, Isa path = isa()) {
  const ChunkEntry e = blob.entry(i);
  const uint64_t n = blob.symbols(i), bytes = n * blob.width;
  const int model = chunk_model(e, blob.model);
  const bool six = model == kExponentAndTwo;
  const uint8_t* p = blob.data + e.offset;
  if (e.method == kRaw) {
    std::memcpy(out, p, bytes);
    return crc32c(out, bytes) == e.crc_decoded ? nullptr : "a raw chunk's checksum is wrong";
  }

  Decoder d;
  std::memcpy(d.states, p, sizeof(d.states));
  p += sizeof(d.states);
  for (uint32_t state : d.states)
    if (state < kStateLower || state >= kStateUpper) return "a state is not in [2^15, 2^31)";
  Table table;
  if (const char* error = read_table(p, e.symbols, model, table)) return error;
  d.shift = table.shift;
  p += padded(4 * e.symbols);
  Buckets buckets;
  make_buckets(table, buckets);
  const bool in_registers = path >= Isa::avx512 && table.size <= kRegisterSymbols;
  Output output;
  const GroupsFunction kernel = groups_function(path, in_registers, blob.width, model, output);
  if (in_registers) fill_registers(table, buckets, symbol_place(output), d.table);
  if (in_registers && path >= Isa::vbmi2) fill_halves(table, buckets, d.table.halves);
  if (!in_registers && path != Isa::portable) fill_slots(table, buckets, d.table);
  if (path == Isa::portable || n % kLanes) fill_portable(table, buckets, d.table);
  for (int s = 0; s < kSegments; ++s) {
    d.words[s].open(p, e.words[s]);
    p += padded(2 * uint64_t(e.words[s]));
  }
  constexpr int kBlockGroups = 32, kBlock = kBlockGroups * kLanes;
  uint8_t symbols[kBlock], unpacked[kBlock], constants[kMaxPlanes][kBlock];
  const uint8_t* planes[kMaxPlanes] = {};
  for (int plane = blob.width - 2; plane >= 0; --plane) {
    const bool constant = e.constant >> plane & 1;
    planes[plane] = p;
    if (constant && six && *p >= 64) return "a constant of six bits has more";
    if (constant) planes[plane] = static_cast<uint8_t*>(std::memset(constants[plane], *p, kBlock));
    p += padded(constant ? 1 : plane_bytes(n, model));
  }
  if (six && e.constant) {  // the plane is that of 64 such values, over and over
    uint8_t group[kSixBytes];
    pack_six(constants[0], group);
    for (int g = 0; g < kBlockGroups; ++g) std::memcpy(constants[0] + g * kSixBytes, group, kSixBytes);
  }

  const bool merged = output != Output::symbols;  // else the symbols of a block are merged with its planes
  const MergeFunction merge_block = merger(blob.width, model, path);
  // A block's checksum is taken while the next one is decoded, where that one is as long: such a kernel's
  // groups have cycles left for it.
  static_assert(CrcLanes::kBytes == 2 * kBlock && CrcLanes::kStep * kBlockGroups == CrcShift::kLane);
  static constexpr uint8_t nothing[CrcLanes::kBytes] = {};
  const uint8_t* unchecked = nullptr;
  uint32_t crc = 0;
  for (uint64_t done = 0; done < n;) {
    const uint64_t block = std::min<uint64_t>(kBlock, n - done), whole = block - block % kLanes;
    uint8_t* place = out + done * blob.width;
    const bool beside = unchecked && whole == kBlock;
    d.check = unchecked ? unchecked : nothing;
    d.crc.begin(crc);
    if (!decode_groups(d, kernel, int(whole / kLanes), planes[0], merged ? place : symbols, output))
      return "a segment's words run out";
    const uint64_t from = merged ? whole : 0;
    if (whole < block && !decode_last_group(d, int(block - whole), symbols + whole))
      return "a segment's words run out";
    const uint8_t* rest[kMaxPlanes];
    for (int plane = 0; plane < kMaxPlanes; ++plane)
      rest[plane] = planes[plane] ? planes[plane] + from : nullptr;
    if (six) {
      for (uint64_t at = from; at < block; at += kLanes)
        unpack_six(planes[0] + at / kLanes * kSixBytes, unpacked + at);
      rest[0] = unpacked + from;
    }
    if (from < block) merge_block(symbols + from, rest, block - from, place + from * blob.width, table.shift);
    if (beside)
      crc = d.crc.end();
    else if (unchecked)
      crc = crc32c(unchecked, CrcLanes::kBytes, crc);
    unchecked = merged && whole == kBlock ? place : nullptr;
    if (!unchecked) crc = crc32c(place, block * blob.width, crc);
    done += block;
    for (int plane = 0; plane < blob.width - 1; ++plane)
      if (!(e.constant >> plane & 1)) planes[plane] += plane_bytes(block, model);
  }
  if (unchecked) crc = crc32c(unchecked, CrcLanes::kBytes, crc);
  for (uint32_t state : d.states)
    if (state != kStateLower) return "a segment does not end in the state it began with";
  for (const Words& w : d.words)
    if (w.next != w.end) return "a segment's words are not used up";
  return crc == e.crc_decoded ? nullptr : "a chunk's checksum is wrong";
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

}  // namespace gaugekit::rans
