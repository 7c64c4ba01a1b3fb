// A chunk as the GPU decodes it (common/rans_lane.h), with the lanes of a warp one after another. It is there
// to test that code; rans_decoder.h is the fast way. Free of torch and of exceptions.
#pragma once

#include <memory>

#include "common/rans_lane.h"

namespace gaugekit::rans {

struct DecodeLanes {
  const ChunkRow& row;
  const Sections& sections;
  const LaneTable& table;
  uint8_t* out;

  template <int width, int model>
  bool kind() const {
    bool good = true;
    for (int segment = 0; segment < kSegments; ++segment) good &= decode<width, model>(segment);
    return good;
  }

  template <int width, int model>
  bool decode(int segment) const {
    const uint32_t words = row.words[segment];
    uint32_t x[kSegmentLanes], next = 0;
    std::memcpy(x, sections.states + 4 * kSegmentLanes * segment, sizeof(x));
    for (uint32_t group = 0; group < row.to; group += kLanes) {
      uint32_t symbol[kSegmentLanes], refills = 0;
      for (int lane = 0; lane < kSegmentLanes; ++lane) {
        if (group + segment * kSegmentLanes + lane_element(lane) >= row.n) continue;
        x[lane] = lane_step(x[lane], table, symbol[lane]);
        refills |= uint32_t(x[lane] < kStateLower) << lane;
      }
      for (int lane = 0; lane < kSegmentLanes; ++lane) {
        const uint32_t e = group + segment * kSegmentLanes + lane_element(lane);
        const uint32_t before = __builtin_popcount(refills & ((1u << lane) - 1));
        if (refills >> lane & 1) x[lane] = x[lane] << 16 | word_at(sections, segment, next + before, words);
        if (e < row.n && row.from <= e && e < row.to)
          store_element<width>(out, e - row.from,
                               lane_element_bits<width, model>(row, sections, e, symbol[lane], table.shift));
      }
      next += __builtin_popcount(refills);
    }
    bool good = true;
    for (uint32_t state : x) good &= state == kStateLower;
    return row.to < row.n || (good && next == words);
  }
};

// False for a row that contradicts the sizes, or a chunk that does not end as a sound one does. Only what the
// row names of `out` is written.
inline bool decode_row(const ChunkRow& row, const uint8_t* packed, uint64_t packed_bytes, uint8_t* out,
                       uint64_t out_bytes) {
  Sections sections{};
  if (!place_sections(row, packed + row.in, packed_bytes, out_bytes, sections)) return false;
  out += row.out;
  if (row.method == kRaw) {
    std::memcpy(out, packed + row.in + uint64_t(row.from) * row.width,
                uint64_t(row.to - row.from) * row.width);
    return true;
  }
  const auto symbols = std::make_unique<Table>();
  const auto buckets = std::make_unique<Buckets>();
  const auto table = std::make_unique<LaneTable>();
  if (read_table(sections.table, row.symbols, row.model, *symbols)) return false;
  make_buckets(*symbols, *buckets);
  fill_lanes(*symbols, *buckets, *table);
  DecodeLanes lanes{row, sections, *table, out};
  return with_lane_kind(row, lanes);
}

}  // namespace gaugekit::rans
