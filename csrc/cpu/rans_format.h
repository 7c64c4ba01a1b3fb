// A coded blob's header and index (docs/format.md), checked whole before anything is allocated or decoded.
// Free of torch and of exceptions: a function returns nullptr, or a sentence that says what is wrong.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/rans_table.h"
#include "crc32c.h"

namespace gaugekit::rans {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a blob's numbers are little-endian");

constexpr char kMagic[9] = "GKRANS\x1a\n";
constexpr uint16_t kVersion = 1;
constexpr uint64_t kHeaderBytes = 48;
constexpr uint64_t kIndexEntryBytes = 32;
constexpr int kMaxRank = 64;
constexpr int kMinChunkLog2 = 14;
constexpr int kMaxChunkLog2 = 20;

enum Element : uint8_t {
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat32 = 3,
  kFloat8E4M3 = 4,
  kFloat8E5M2 = 5,
  kInt8 = 6
};

template <class T>
void store(uint8_t* p, T value) {
  std::memcpy(p, &value, sizeof(T));
}

// Bytes of an element, 0 for an id that this version does not read.
constexpr int element_bytes(int element) {
  constexpr int bytes[] = {0, 2, 2, 4, 1, 1, 1};
  return 0 <= element && element <= kInt8 ? bytes[element] : 0;
}

constexpr bool model_applies(int element, int model) {
  if (model == kHighByte) return element_bytes(element) != 0;
  if (model == kExponent) return element == kBFloat16 || element == kFloat32;
  return model == kExponentAndTwo && element == kBFloat16;
}

// Chunks of 2^log2 symbols; what is left after the last one joins it when it is at most half a chunk.
constexpr uint64_t chunk_count(uint64_t count, int log2) {
  if (count == 0) return 0;
  const uint64_t half = uint64_t(1) << (log2 - 1);
  const uint64_t chunks = (count >> log2) + ((count & (2 * half - 1)) > half);
  return chunks ? chunks : 1;
}

struct ChunkEntry {
  uint64_t offset;
  uint32_t length;
  uint16_t symbols;
  uint8_t method;
  uint8_t constant;
  uint32_t words[kSegments];
  uint32_t crc_coded;
  uint32_t crc_decoded;
};
static_assert(sizeof(ChunkEntry) == kIndexEntryBytes, "the entry is its bytes in the index");

struct Blob {
  const uint8_t* data;
  uint64_t size;
  int element, model, chunk_log2, rank, width;
  uint64_t count, chunks, index_offset;

  uint64_t dim(int i) const { return load<uint64_t>(data + kHeaderBytes + 8 * i); }
  ChunkEntry entry(uint64_t i) const { return load<ChunkEntry>(data + index_offset + i * kIndexEntryBytes); }
  uint64_t first(uint64_t i) const { return i << chunk_log2; }
  uint64_t symbols(uint64_t i) const {
    return i + 1 == chunks ? count - first(i) : uint64_t(1) << chunk_log2;
  }
};

// Symbols of one segment of a chunk of n: 32 of each group of 64, the second segment the second half.
constexpr uint64_t segment_symbols(uint64_t n, int segment) {
  const uint64_t rest = n % kLanes, start = segment * uint64_t(kSegmentLanes);
  const uint64_t last = rest <= start ? 0 : rest - start;
  return n / kLanes * kSegmentLanes + (last < kSegmentLanes ? last : uint64_t(kSegmentLanes));
}

// The model of one chunk's symbols: a blob of model 2 may have chunks of model 0.
constexpr int chunk_model(const ChunkEntry& e, int model) {
  return e.method == kCodedByExponent ? int(kExponent) : model;
}

// Bytes of a plane of n elements: one each, or with model 2 six bits.
constexpr uint64_t plane_bytes(uint64_t n, int model) {
  return model == kExponentAndTwo ? (n + kLanes - 1) / kLanes * kSixBytes : n;
}

// Bytes that a coded chunk's own numbers ask for.
inline uint64_t coded_length(const ChunkEntry& e, uint64_t n, int width, int model) {
  uint64_t length = 4 * kLanes + padded(4 * uint64_t(e.symbols));
  for (uint32_t words : e.words) length += padded(2 * uint64_t(words));
  for (int plane = 0; plane < width - 1; ++plane)
    length += padded(e.constant >> plane & 1 ? 1 : plane_bytes(n, chunk_model(e, model)));
  return length;
}

inline const char* check_entry(const ChunkEntry& e, uint64_t n, int width, int model) {
  if (e.method == kRaw) {
    if (e.symbols || e.constant || e.words[0] || e.words[1]) return "a raw chunk has fields of a coded one";
    return e.length == padded(n * width) ? nullptr : "a raw chunk's length is not that of its elements";
  }
  if (e.method != kCoded && (e.method != kCodedByExponent || model != kExponentAndTwo))
    return "a chunk's method is not one this version reads";
  if (e.symbols == 0 || e.symbols > kMaxSymbols) return "a chunk's number of symbols is not in 1..256";
  if (e.constant >> (width - 1)) return "a chunk names a constant plane that its elements lack";
  for (int s = 0; s < kSegments; ++s)
    if (e.words[s] > segment_symbols(n, s)) return "a segment has more words than symbols";
  return e.length == coded_length(e, n, width, model) ? nullptr
                                                      : "a chunk's length is not the sum of its sections";
}

// Fills `blob` from data[0, size) after checking header, index and the place of every chunk.
inline const char* open_blob(const uint8_t* data, uint64_t size, Blob& blob) {
  if (size < kHeaderBytes) return "it is shorter than a header";
  if (std::memcmp(data, kMagic, 8)) return "the magic bytes are not those of a coded blob";
  if (load<uint16_t>(data + 8) != kVersion) return "its version is not one this version reads";
  blob.data = data;
  blob.size = size;
  blob.rank = data[15];
  if (blob.rank > kMaxRank) return "it has more than 64 dimensions";
  blob.index_offset = padded(kHeaderBytes + 8 * uint64_t(blob.rank));
  if (size < blob.index_offset) return "it ends within its shape";
  static constexpr uint8_t zeros[4] = {};
  const uint32_t crc = crc32c(data + 48, blob.index_offset - 48, crc32c(zeros, 4, crc32c(data, 44)));
  if (load<uint32_t>(data + 44) != crc) return "the header's checksum is wrong";

  blob.element = data[10];
  blob.model = data[11];
  blob.chunk_log2 = data[14];
  blob.width = element_bytes(blob.element);
  if (blob.width == 0) return "its element type is not one this version reads";
  if (!model_applies(blob.element, blob.model)) return "its symbol model is not one this version reads";
  if (data[12] != 0) return "its context model is not one this version reads";
  if (data[13] != 1) return "its number of tables a chunk is not one this version reads";
  if (blob.chunk_log2 < kMinChunkLog2 || blob.chunk_log2 > kMaxChunkLog2)
    return "its symbols a chunk are not 2^14 to 2^20";
  if (load<uint32_t>(data + 40) != 0) return "a reserved field is not zero";
  blob.count = load<uint64_t>(data + 16);
  uint64_t product = 1;
  bool empty = false;
  for (int i = 0; i < blob.rank; ++i) empty |= blob.dim(i) == 0;
  for (int i = 0; i < blob.rank; ++i) {
    if (blob.dim(i) >> 63) return "a dimension does not fit 63 bits";
    if (!empty && __builtin_mul_overflow(product, blob.dim(i), &product)) return "the shape overflows";
  }
  if (blob.count != (empty ? 0 : product)) return "the shape does not multiply to the count";
  if (blob.count >> 60) return "the count overflows";
  if (load<uint64_t>(data + 24) != size) return "its length is not the one it names";
  blob.chunks = chunk_count(blob.count, blob.chunk_log2);
  if (load<uint32_t>(data + 32) != blob.chunks) return "the number of chunks does not follow from the count";
  if (blob.chunks > (size - blob.index_offset) / kIndexEntryBytes) return "it ends within its index";
  const uint64_t index_bytes = blob.chunks * kIndexEntryBytes;
  if (load<uint32_t>(data + 36) != crc32c(data + blob.index_offset, index_bytes))
    return "the index's checksum is wrong";

  uint64_t cursor = blob.index_offset + index_bytes;
  for (uint64_t i = 0; i < blob.chunks; ++i) {
    const ChunkEntry e = blob.entry(i);
    if (e.offset != cursor) return "a chunk does not start where the one before it ends";
    if (const char* error = check_entry(e, blob.symbols(i), blob.width, blob.model)) return error;
    if (e.length > size - cursor) return "a chunk runs past the end";
    cursor += e.length;
  }
  return cursor == size ? nullptr : "bytes follow the last chunk";
}

// Writes header, shape and index at out[0, padded(48 + 8 * rank) + 32 * chunks) once every entry is known.
inline void write_header(uint8_t* out, uint64_t size, int element, int model, int chunk_log2,
                         const int64_t* shape, int rank, uint64_t count, const ChunkEntry* entries,
                         uint64_t chunks) {
  const uint64_t index_offset = padded(kHeaderBytes + 8 * uint64_t(rank));
  std::memset(out, 0, index_offset);
  std::memcpy(out, kMagic, 8);
  store<uint16_t>(out + 8, kVersion);
  out[10] = uint8_t(element);
  out[11] = uint8_t(model);
  out[12] = 0;
  out[13] = 1;
  out[14] = uint8_t(chunk_log2);
  out[15] = uint8_t(rank);
  store<uint64_t>(out + 16, count);
  store<uint64_t>(out + 24, size);
  store<uint32_t>(out + 32, uint32_t(chunks));
  if (rank) std::memcpy(out + kHeaderBytes, shape, 8 * size_t(rank));
  if (chunks) std::memcpy(out + index_offset, entries, chunks * kIndexEntryBytes);
  store<uint32_t>(out + 36, crc32c(out + index_offset, chunks * kIndexEntryBytes));
  store<uint32_t>(out + 44, crc32c(out, index_offset));
}

}  // namespace gaugekit::rans
