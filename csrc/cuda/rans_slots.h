// The decoder of rans_decode_rows that looks each symbol up in one table of 4096 slots (common/rans_slots.h),
// which the block makes together. Coded words wait in shared memory before a lane asks for them; state and
// sections stay in registers; a chunk that is wanted whole is decoded without tests of range, eight groups a
// turn.
#pragma once

#include <cuda_runtime.h>

#include "common/rans_slots.h"

namespace gaugekit::rans {
namespace {

constexpr int kSlotThreads = kLanes, kGroups = 8;
constexpr uint32_t kRingWords = 512,
                   kFillWords = 4 * kSegmentLanes;  // 16-bit words; a lane brings four at a time
static_assert((kGroups * kSegmentLanes + kFillWords) <= kRingWords, "what is wanted, and what comes");

__device__ __forceinline__ uint32_t shared_address(const void* place) {
  // Moved once more, or the compiler makes it anew in every turn of a loop.
  uint32_t address;
  asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(uint32_t(__cvta_generic_to_shared(place))));
  return address;
}

// A segment's coded words on their way to the lanes of its warp: a ring in shared memory and the words after
// it, which are already being read. `filled` and a reader's `next` count bytes.
struct WordRing {
  const uint8_t* from;
  uint2* ring;
  uint32_t bytes, filled;
  uint2 coming;

  __device__ WordRing(const uint8_t* section, uint32_t words, uint16_t* place)
      : from(section), ring(reinterpret_cast<uint2*>(place)), bytes(2 * words), filled(0) {
    fetch();
  }

  // The four words that this lane brings next: those past the segment's end are its padding, or 0.
  __device__ __forceinline__ void fetch() {
    const uint32_t at = filled + 8 * (threadIdx.x % kSegmentLanes);
    coming = at < bytes ? __ldg(reinterpret_cast<const uint2*>(from + at)) : uint2{0, 0};
  }

  // Makes the bytes before `until` readable.
  __device__ __forceinline__ void fill(uint32_t until) {
    while (filled < until) {
      ring[(filled / 8 + threadIdx.x % kSegmentLanes) % (kRingWords / 4)] = coming;
      filled += 2 * kFillWords;
      fetch();
      __syncwarp();
    }
  }
};

// One lane: its state, where its warp's next word stands in the ring, and the shared memory it reads.
struct SlotLane {
  uint32_t x, next, slots, ring, below;

  // A symbol's word from the table of slots, and the state before a word is taken. The compiler left to
  // itself takes three instructions for the address.
  __device__ __forceinline__ uint32_t look(uint32_t& y) const {
    uint32_t slot, found;
    asm volatile("and.b32 %0, %1, 4095;" : "=r"(slot) : "r"(x));
    asm volatile("{ .reg .b32 at;\nmad.lo.u32 at, %1, 4, %2;\nld.shared.u32 %0, [at]; }"
                 : "=r"(found)
                 : "r"(slot), "r"(slots));
    const uint32_t whole = x >> kProbabilityBits;
    y = (found >> 20) * whole + (whole + (found & 0xfff));
    return found;
  }

  // The next word into each lane below kStateLower, in the order of the lanes, none where `still`.
  __device__ __forceinline__ void refill(uint32_t y, bool still) {
    asm volatile(
        "{ .reg .pred on, takes;\n.reg .b32 all, at, word;\n"
        "setp.eq.u32 on, %4, 0;\n"
        "setp.lt.and.u32 takes, %0, %5, on;\n"
        "vote.sync.ballot.b32 all, takes, 0xffffffff;\n"
        "and.b32 at, all, %2;\n"
        "popc.b32 at, at;\n"
        "mad.lo.u32 at, at, 2, %1;\n"
        "lop3.b32 at, at, %6, %3, 0xea;\n"
        "ld.shared.u16 word, [at];\n"
        "@takes prmt.b32 %0, word, %0, 0x5410;\n"
        "popc.b32 all, all;\n"
        "mad.lo.u32 %1, all, 2, %1; }"
        : "+r"(y), "+r"(next)
        : "r"(below), "r"(ring), "r"(uint32_t(still)), "n"(kStateLower), "n"(2 * kRingWords - 2)
        : "memory");
    x = y;
  }
};

// Decodes this thread's lane; true if the lane ends where a sound one does.
struct DecodeSlots {
  const ChunkRow& row;
  const Sections& sections;
  const SlotTable& table;
  uint16_t* ring;
  uint8_t* out;

  template <int width, int model>
  __device__ bool kind() const {
    const int segment = threadIdx.x / kSegmentLanes, lane = threadIdx.x % kSegmentLanes;
    const uint32_t place = segment * kSegmentLanes + lane_element(lane);
    const uint32_t count = segment ? row.words[1] : row.words[0];
    uint16_t* own_ring = ring + segment * kRingWords;
    WordRing words(segment ? sections.words[1] : sections.words[0], count, own_ring);
    SlotLane own{__ldg(reinterpret_cast<const uint32_t*>(sections.states) + threadIdx.x), 0,
                 shared_address(table.slot), shared_address(own_ring), (1u << lane) - 1};
    const bool whole = row.from == 0 && row.to == row.n && !row.constant;
    uint32_t group = 0;
    if (whole) group = all<width, model>(own, words, place);
    for (; group < row.to; group += kLanes) {
      const uint32_t e = group + place;
      words.fill(own.next + 2 * kSegmentLanes);
      uint32_t y = own.x, found = 0;
      if (e < row.n) found = own.look(y);
      own.refill(y, e >= row.n);
      if (row.from <= e && e < row.to)
        store_element<width>(
            out, e - row.from,
            lane_element_bits<width, model>(row, sections, e, slot_symbol(found), table.shift));
      __syncwarp();
    }
    return row.to < row.n || (own.x == kStateLower && own.next == 2 * count);
  }

  // Every whole turn of eight groups; where the rest begins.
  template <int width, int model>
  __device__ uint32_t all(SlotLane& own, WordRing& words, uint32_t place) const {
    const uint32_t stop = row.n / (kGroups * kLanes) * (kGroups * kLanes);
    const uint8_t* planes[width > 1 ? width - 1 : 1];
#pragma unroll
    for (int p = 0; p < width - 1; ++p) planes[p] = sections.planes[p] + place;
    uint8_t* to = out + uint64_t(place) * width;
#pragma unroll 1
    for (uint32_t group = 0; group < stop; group += kGroups * kLanes) {
      words.fill(own.next + 2 * kGroups * kSegmentLanes);
      uint32_t raw[kGroups][width > 1 ? width - 1 : 1], found[kGroups];
      if constexpr (model != kExponentAndTwo) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
#pragma unroll
          for (int p = 0; p < width - 1; ++p) raw[g][p] = __ldg(planes[p] + g * kLanes);
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t y;
        found[g] = own.look(y);
        own.refill(y, false);
      }
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
  __shared__ alignas(2 * kRingWords) uint16_t ring[kSegments * kRingWords];
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
