// A whole blob coded and decoded, chunks in parallel. Free of torch: the operators (rans.cpp) and the library
// that needs no torch (csrc/codec) share it.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/turns.h"
#include "rans_decoder.h"
#include "rans_places.h"

namespace gaugekit::rans {

// About what an element's byte takes, coded and decoded: good enough to tell when a thread is worth calling.
inline constexpr double kEncodeNs = 0.8, kDecodeNs = 0.4;

// New memory comes in huge pages where it is so large that the C library maps it anew (no other memory
// changes): filling pages of 4 KiB takes longer than coding into them. All of this is advice, and a refusal
// costs speed only.
class NewPages {
 public:
  NewPages(void* data, uint64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uint64_t kMapped = uint64_t(1) << 25;
    if (bytes < kMapped) return;
    first_ = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
    last_ = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(first_), last_ - first_, MADV_HUGEPAGE);
#endif
  }

  // Who is the first to reach into a page has the next one filled: of two threads that come to a new page
  // together, both would.
  void reach(const uint8_t* begin, const uint8_t* end) const {
#ifdef MADV_POPULATE_WRITE
    const uintptr_t page = reinterpret_cast<uintptr_t>(end) & ~(kPage - 1), next = page + kPage;
    if (reinterpret_cast<uintptr_t>(begin) < page && first_ <= next && next < last_)
      madvise(reinterpret_cast<void*>(next), kPage, MADV_POPULATE_WRITE);
#endif
  }

 private:
  static constexpr uintptr_t kPage = uintptr_t(1) << 21;
  uintptr_t first_ = 0, last_ = 0;
};

// Room for a blob of `bytes` bytes of elements: the header, the index, and every chunk stored raw.
inline uint64_t most_bytes(uint64_t bytes, int element, int chunk_log2, int rank) {
  const uint64_t chunks = chunk_count(bytes / element_bytes(element), chunk_log2);
  return padded(kHeaderBytes + 8 * uint64_t(rank)) + chunks * (kIndexEntryBytes + 16) + bytes;
}

// Codes `count` elements at `in` into `out` (room for most_bytes) and
// returns the bytes written.
inline uint64_t encode_blob(const uint8_t* in, uint64_t count, int element, int model, int chunk_log2,
                            const int64_t* shape, int rank, uint8_t* out, const NewPages& pages,
                            uint64_t threads, Isa path) {
  const uint64_t width = element_bytes(element), chunks = chunk_count(count, chunk_log2);
  std::vector<ChunkEntry> entries(chunks);
  Places places(padded(kHeaderBytes + 8 * uint64_t(rank)) + chunks * kIndexEntryBytes, chunks);
  auto elements = [&](uint64_t i) {
    const uint64_t first = i << chunk_log2;
    return Elements{in + first * width, i + 1 == chunks ? count - first : uint64_t(1) << chunk_log2};
  };
  threads = std::min(chunks, threads);
  const uint64_t together = encodes_pairs(path, model) && chunks >= kTogether * threads ? kTogether : 1;
  const uint64_t turns = (chunks + together - 1) / together;
  const uint64_t chunk_bytes = std::min(count, uint64_t(1) << chunk_log2) * width;
  take_turns(turns, threads, kEncodeNs * chunk_bytes * together, [&](auto& next) {
    Kept kept(std::max(elements(0).count, elements(chunks - 1).count), int(width), threads, together);
    const auto last = [&](uint64_t turn) { return std::min((turn + 1) * together, chunks) - 1; };
    const auto put_oldest = [&] {
      const auto& [turn, coded] = kept.oldest();
      for (uint64_t first = turn * together, i = first; i <= last(turn); ++i) {
        const uint64_t place = entries[i].offset = places.of(i);
        pages.reach(out + place, out + place + entries[i].length);
        put_chunk(elements(i), int(width), coded[i - first], entries[i], out + place);
      }
      kept.drop_oldest();
    };
    for (uint64_t turn; (turn = next()) < turns;) {
      const uint64_t first = turn * together, count = last(turn) - first + 1;
      EncoderScratch* coded = kept.next();
      Elements parts[kTogether];
      for (uint64_t k = 0; k < count; ++k) {
        const uint64_t i = first + k;
        parts[k] = elements(i);
        const uint8_t* later = elements(std::min(i + threads * together, chunks - 1)).data;
        coded[k].ahead = {later, out + places.guess(i), int(width)};
      }
      code_chunks(parts, int(count), element, model, coded, &entries[first], path);
      for (uint64_t k = 0; k < count; ++k) places.add(first + k, entries[first + k].length);
      kept.keep(turn);
      while (!kept.empty() && places.knows(last(kept.oldest().index))) put_oldest();
      if (!kept.make_room()) put_oldest();
    }
    while (!kept.empty()) put_oldest();
  });
  write_header(out, places.end(), element, model, chunk_log2, shape, rank, count, entries.data(), chunks);
  return places.end();
}

// Elements [start, stop) into `out`, chunks in parallel. Of several damaged chunks the first one's error is
// returned.
inline const char* decode_blob(const Blob& blob, uint64_t start, uint64_t stop, uint8_t* out,
                               uint64_t threads, Isa path) {
  if (start == stop) return nullptr;
  const uint64_t last_chunk = blob.chunks - 1;
  const uint64_t from = std::min(start >> blob.chunk_log2, last_chunk);
  const uint64_t to = std::min((stop - 1) >> blob.chunk_log2, last_chunk) + 1;
  const uint64_t together = decodes_pairs(path) && to - from >= 2 * threads ? 2 : 1;
  std::vector<const char*> errors((to - from + together - 1) / together, nullptr);
  const double chunk_bytes = std::min<uint64_t>(stop - start, uint64_t(1) << blob.chunk_log2) * blob.width;
  take_turns(errors.size(), threads, kDecodeNs * chunk_bytes * together, [&](auto& next) {
    for (uint64_t i; (i = next()) < errors.size();) {
      const uint64_t chunk = from + i * together;
      errors[i] = decode_overlaps(blob, chunk, std::min(chunk + together, to), start, stop, out, path);
    }
  });
  for (const char* error : errors)
    if (error) return error;
  return nullptr;
}

}  // namespace gaugekit::rans
