// The coder of blobs behind plain C functions, for a process without torch: python/gaugekit/coder/binary.py
// calls them through ctypes. Needs neither torch nor Python. Sentences that come back are errors, nullptr is
// none.
#include <algorithm>
#include <exception>
#include <iterator>

#include "cpu/crc32c.h"
#include "cpu/rans_blob.h"

#define GAUGEKIT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace gaugekit;

constexpr char kNoMemory[] = "out of memory";

// As the operators choose (rans.cpp): 0 portable to 3 with VBMI2, or less where the processor has less; -1
// the widest.
Isa chosen(int path) { return path < 0 ? isa() : std::min(Isa(path), isa()); }

}  // namespace

// How much room gaugekit_rans_encode may need.
GAUGEKIT_EXPORT uint64_t gaugekit_rans_room(uint64_t bytes, int element, int chunk_log2, int rank) {
  return rans::most_bytes(bytes, element, chunk_log2, rank);
}

// The blob of `bytes` bytes of whole elements; `size` becomes its length. Element, model, chunk_log2 and rank
// are ones the format has: the caller has seen to it.
GAUGEKIT_EXPORT const char* gaugekit_rans_encode(const uint8_t* data, uint64_t bytes, int element, int model,
                                                 int chunk_log2, const int64_t* shape, int rank, uint8_t* out,
                                                 uint64_t* size, int threads, int path) try {
  const rans::NewPages pages(out, gaugekit_rans_room(bytes, element, chunk_log2, rank));
  *size = rans::encode_blob(data, bytes / rans::element_bytes(element), element, model, chunk_log2, shape,
                            rank, out, pages, threads, chosen(path));
  return nullptr;
} catch (const std::exception&) {
  return kNoMemory;
}

// Element, model, chunk_log2, count, rank and the shape into `fields`, 5 + 64 numbers, after header, index
// and sizes were checked.
GAUGEKIT_EXPORT const char* gaugekit_rans_open(const uint8_t* blob, uint64_t bytes, int64_t* fields) {
  rans::Blob opened{};
  if (const char* error = rans::open_blob(blob, bytes, opened)) return error;
  const int64_t first[] = {opened.element, opened.model, opened.chunk_log2, int64_t(opened.count),
                           opened.rank};
  fields = std::copy(std::begin(first), std::end(first), fields);
  for (int i = 0; i < opened.rank; ++i) fields[i] = int64_t(opened.dim(i));
  return nullptr;
}

// Elements [start, stop) into `out`: a range of the blob, and room for it. The caller has seen to that.
GAUGEKIT_EXPORT const char* gaugekit_rans_decode(const uint8_t* blob, uint64_t bytes, uint64_t start,
                                                 uint64_t stop, uint8_t* out, int threads, int path) try {
  rans::Blob opened{};
  if (const char* error = rans::open_blob(blob, bytes, opened)) return error;
  return rans::decode_blob(opened, start, stop, out, threads, chosen(path));
} catch (const std::exception&) {
  return kNoMemory;
}

GAUGEKIT_EXPORT uint32_t gaugekit_crc32c(const uint8_t* data, uint64_t bytes, uint32_t crc) {
  return rans::crc32c(data, bytes, crc);
}
