// Sound blobs of every element type and model, and damaged ones made from them. The checksums are made right
// again, else hardly a mutation would pass the first of them.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "cpu/rans_encoder.h"

namespace gaugekit::rans {

using Bytes = std::vector<uint8_t>;

struct Kind {
  int element, model;
};
constexpr Kind kKinds[] = {{kBFloat16, kExponent},   {kBFloat16, kHighByte},   {kBFloat16, kExponentAndTwo},
                           {kFloat16, kHighByte},    {kFloat32, kExponent},    {kFloat32, kHighByte},
                           {kFloat8E4M3, kHighByte}, {kFloat8E5M2, kHighByte}, {kInt8, kHighByte}};

inline Bytes blob_of(const uint8_t* data, uint64_t n, Kind kind, int chunk_log2, Isa path) {
  const uint64_t width = element_bytes(kind.element), chunks = chunk_count(n, chunk_log2);
  uint64_t cursor = padded(kHeaderBytes + 8) + chunks * kIndexEntryBytes;
  Bytes blob(cursor + padded(n * width) + 16 * chunks);
  std::vector<ChunkEntry> entries(chunks);
  EncoderScratch scratch;
  for (uint64_t i = 0; i < chunks; ++i) {
    const uint64_t first = i << chunk_log2, count = i + 1 == chunks ? n - first : uint64_t(1) << chunk_log2;
    entries[i] = encode_chunk(data + first * width, count, kind.element, kind.model, blob.data() + cursor,
                              scratch, path);
    entries[i].offset = cursor;
    cursor += entries[i].length;
  }
  blob.resize(cursor);
  const int64_t shape = int64_t(n);
  write_header(blob.data(), cursor, kind.element, kind.model, chunk_log2, &shape, 1, n, entries.data(),
               chunks);
  return blob;
}

// Length and checksums of header, index and coded chunks made right, as far as they lie within the bytes.
inline void reseal(Bytes& blob) {
  if (blob.size() < kHeaderBytes) return;
  const uint64_t begin = std::min<uint64_t>(padded(kHeaderBytes + 8 * uint64_t(blob[15])), blob.size());
  const uint64_t chunks =
      std::min<uint64_t>(load<uint32_t>(blob.data() + 32), (blob.size() - begin) / kIndexEntryBytes);
  for (uint64_t i = 0; i < chunks; ++i) {
    uint8_t* entry = blob.data() + begin + i * kIndexEntryBytes;
    const uint64_t offset = load<uint64_t>(entry), length = load<uint32_t>(entry + 8);
    if (offset <= blob.size() && length <= blob.size() - offset)
      store<uint32_t>(entry + 24, crc32c(blob.data() + offset, length));
  }
  store<uint64_t>(blob.data() + 24, blob.size());
  store<uint32_t>(blob.data() + 36, crc32c(blob.data() + begin, chunks * kIndexEntryBytes));
  store<uint32_t>(blob.data() + 44, 0);
  store<uint32_t>(blob.data() + 44, crc32c(blob.data(), begin));
}

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {
    for (Kind kind : kKinds)
      for (uint64_t n : {1, 63, 64, 65, 500, 2000, 24577}) {
        Bytes data(n * element_bytes(kind.element));
        fill(data, kind, n % 2);
        seeds_.push_back(blob_of(data.data(), n, kind, kMinChunkLog2, isa()));
      }
  }

  // Of the sound blobs, the same on every processor.
  uint32_t digest() const {
    uint32_t crc = 0;
    for (const Bytes& blob : seeds_) crc = crc32c(blob.data(), blob.size()) ^ (crc << 1 | crc >> 31);
    return crc;
  }

  Bytes next() {
    Bytes blob = seeds_[below(seeds_.size())];
    for (uint64_t left = 1 + below(4); left--;) mutate(blob);
    return blob;
  }

 private:
  uint64_t below(uint64_t limit) { return limit ? random_() % limit : 0; }

  // Elements whose leading bits are drawn from few values; with a zero here and there.
  void fill(Bytes& data, Kind kind, bool zeros) {
    const int width = element_bytes(kind.element);
    for (size_t i = 0; i < data.size(); ++i) {
      const bool top = int(i % width) == width - 1;
      data[i] = top ? uint8_t(0x3C - __builtin_ctzll(random_() | 256)) : uint8_t(random_());
      if (zeros && i % 37 == 0) data[i] = 0;
    }
  }

  void mutate(Bytes& blob) {
    static constexpr uint64_t kSpecial[] = {
        0,   1,    2,    15,   16,   31,   32,    33,    63,    64,    127,      128, 255,        256,
        257, 1023, 1024, 4095, 4096, 4097, 32767, 32768, 65535, 65536, 1u << 31, ~0u, 1ull << 60, ~0ull};
    if (blob.empty()) return;
    // Header, index, states and table stand at the front: most mutations go there.
    const uint64_t place = below(below(3) ? std::min<uint64_t>(blob.size(), 800) : blob.size());
    const uint64_t special = kSpecial[below(std::size(kSpecial))];
    switch (below(9)) {
      case 0:
        blob[place] ^= uint8_t(1 << below(8));
        break;
      case 1:
        blob[place] = uint8_t(random_());
        break;
      case 2:
        put(blob, place & ~uint64_t(1), uint16_t(special));
        break;
      case 3:
        put(blob, place & ~uint64_t(3), uint32_t(special));
        break;
      case 4:
        put(blob, place & ~uint64_t(7), special);
        break;
      case 5:
        put(blob, place & ~uint64_t(1), uint16_t(load_at(blob, place & ~uint64_t(1)) + below(5) - 2));
        break;
      case 6:
        blob.resize(place);
        break;
      case 7:
        blob.insert(blob.begin() + place, 16 * (1 + below(4)), uint8_t(random_()));
        break;
      default: {
        const uint64_t from = below(blob.size()),
                       n = std::min(below(64), blob.size() - std::max(from, place));
        std::memmove(blob.data() + place, blob.data() + from, n);
      }
    }
  }

  static uint16_t load_at(const Bytes& blob, uint64_t place) {
    return place + 2 <= blob.size() ? load<uint16_t>(blob.data() + place) : 0;
  }
  template <class T>
  static void put(Bytes& blob, uint64_t place, T value) {
    if (place + sizeof(T) <= blob.size()) store<T>(blob.data() + place, value);
  }

  std::mt19937_64 random_;
  std::vector<Bytes> seeds_;
};

}  // namespace gaugekit::rans
