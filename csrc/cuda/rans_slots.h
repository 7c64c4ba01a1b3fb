// The decoder of rans_decode_rows that looks each symbol up in one table of 4096 slots (common/rans_slots.h), which
// the block makes together. Coded words wait in shared memory before a lane asks for them; state and sections stay in
// registers; a chunk that is wanted whole is decoded without tests of range, four groups a turn.
#pragma once

#include <cuda_runtime.h>

#include "common/rans_slots.h"

namespace gaugekit::rans {
namespace {

constexpr int kSlotThreads = kLanes, kGroups = 4;
constexpr uint32_t kRingWords = 256, kFillWords = 2 * kSegmentLanes;  // 16-bit words; a lane brings two at a time

// A segment's coded words on their way to the lanes of its warp: a ring in shared memory and the words after it,
// which are already being read.
struct WordRing {
  const uint32_t* from;
  uint16_t* ring;
  uint32_t words, filled, coming;

  __device__ WordRing(const uint8_t* section, uint32_t count, uint16_t* place)
      : from(reinterpret_cast<const uint32_t*>(section)), ring(place), words(count), filled(0) {
    fetch();
  }

  // The pair of words that this lane brings next; zero beyond the segment's end.
  __device__ __forceinline__ void fetch() {
    const uint32_t at = filled + 2 * (threadIdx.x % kSegmentLanes);
    coming = at < words ? __ldg(from + at / 2) : 0;
    if (at + 1 == words) coming &= 0xffff;
  }

  // Makes the words before `until` readable; at most kRingWords - kFillWords of them may still be wanted.
  __device__ __forceinline__ void fill(uint32_t until) {
    while (filled < until) {
      reinterpret_cast<uint32_t*>(ring)[(filled / 2 + threadIdx.x % kSegmentLanes) % (kRingWords / 2)] = coming;
      filled += kFillWords;
      fetch();
      __syncwarp();
    }
  }

  __device__ __forceinline__ uint32_t at(uint32_t word) const { return ring[word % kRingWords]; }
};

// Decodes this thread's lane; true if the lane ends where a sound one does.
struct DecodeSlots {
  const ChunkRow& row;
  const Sections& sections;
  const SlotTable& table;
  uint16_t* ring;
  uint8_t* out;

  // One symbol of each lane: every lane where `ALL`, else those that are `live`.
  template <bool ALL>
  __device__ __forceinline__ uint32_t step(uint32_t& x, uint32_t& next, WordRing& words, bool live) const {
    uint32_t found = 0, y = x;
    if (ALL || live) y = slot_step(x, table.slot, found);
    const bool short_of_bits = (ALL || live) && y < kStateLower;
    const uint32_t refills = __ballot_sync(~0u, short_of_bits);
    uint32_t below;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    if (short_of_bits) y = y << 16 | words.at(next + __popc(refills & below));
    next += __popc(refills);
    x = y;
    return found;
  }

  template <int width, int model>
  __device__ bool kind() const {
    const int segment = threadIdx.x / kSegmentLanes, lane = threadIdx.x % kSegmentLanes;
    const uint32_t place = segment * kSegmentLanes + lane_element(lane);
    uint32_t x = __ldg(reinterpret_cast<const uint32_t*>(sections.states) + threadIdx.x), next = 0;
    const uint32_t count = segment ? row.words[1] : row.words[0];
    WordRing words(segment ? sections.words[1] : sections.words[0], count, ring + segment * kRingWords);
    const bool whole = row.from == 0 && row.to == row.n && !row.constant;
    uint32_t group = 0;
    if (whole) group = all<width, model>(x, next, words, place);
    for (; group < row.to; group += kLanes) {
      const uint32_t e = group + place;
      words.fill(next + kSegmentLanes);
      const uint32_t found = step<false>(x, next, words, e < row.n);
      if (row.from <= e && e < row.to)
        store_element<width>(
            out, e - row.from,
            lane_element_bits<width, model>(row, sections, e, slot_symbol(found), table.shift));
      __syncwarp();
    }
    return row.to < row.n || (x == kStateLower && next == count);
  }

  // Every whole turn of four groups; where the rest begins.
  template <int width, int model>
  __device__ uint32_t all(uint32_t& x, uint32_t& next, WordRing& words, uint32_t place) const {
    const uint32_t stop = row.n / (kGroups * kLanes) * (kGroups * kLanes);
    const uint8_t* planes[width > 1 ? width - 1 : 1];
#pragma unroll
    for (int p = 0; p < width - 1; ++p) planes[p] = sections.planes[p] + place;
    uint8_t* to = out + uint64_t(place) * width;
#pragma unroll 1
    for (uint32_t group = 0; group < stop; group += kGroups * kLanes) {
      words.fill(next + kGroups * kSegmentLanes);
      uint32_t raw[kGroups][width > 1 ? width - 1 : 1], found[kGroups];
      if constexpr (model != kExponentAndTwo) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
#pragma unroll
          for (int p = 0; p < width - 1; ++p) raw[g][p] = __ldg(planes[p] + g * kLanes);
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) found[g] = step<true>(x, next, words, true);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t bits;
        if constexpr (model == kExponentAndTwo)
          bits = lane_element_bits<width, model>(row, sections, group + g * kLanes + place,
                                                 slot_symbol(found[g]), table.shift);
        else
          bits = element_of<width, model>(found[g], raw[g]);
        store_element<width>(to, g * kLanes, bits);
      }
#pragma unroll
      for (int p = 0; p < width - 1; ++p) planes[p] += kGroups * kLanes;
      to += kGroups * kLanes * width;
      __syncwarp();
    }
    return stop;
  }
};

__global__ void __launch_bounds__(kSlotThreads)
    _rans_decode_slots(const uint8_t* packed, uint64_t packed_bytes, const ChunkRow* rows, uint8_t* out,
                       uint64_t out_bytes, int32_t* damaged) {
  __shared__ SlotTable table;
  __shared__ SlotMaker maker;
  __shared__ alignas(16) uint16_t ring[kSegments * kRingWords];
  const ChunkRow row = rows[blockIdx.x];
  Sections sections;
  bool good = place_sections(row, packed + row.in, packed_bytes, out_bytes, sections);
  if (good && row.method == kRaw) {
    const uint8_t* from = packed + row.in + uint64_t(row.from) * row.width;
    const uint64_t bytes = uint64_t(row.to - row.from) * row.width;
    for (uint64_t i = threadIdx.x; i < bytes; i += kSlotThreads) out[row.out + i] = from[i];
  } else if (good) {
    const auto meet = [](bool bad) { return __syncthreads_or(bad) != 0; };
    good = make_slots(sections.table, row.symbols, row.model, threadIdx.x, kSlotThreads, maker, table, meet);
    DecodeSlots decoder{row, sections, table, ring, out + row.out};
    if (good) good = with_lane_kind(row, decoder);
  }
  const bool bad = __syncthreads_or(!good);
  if (threadIdx.x == 0) damaged[blockIdx.x] = bad;
}

}  // namespace
}  // namespace gaugekit::rans
