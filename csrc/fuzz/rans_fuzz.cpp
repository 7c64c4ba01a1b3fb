// Feeds arbitrary bytes to the parser and decoder of coded blobs, and as elements to the encoder.
//   clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -DGAUGEKIT_LIBFUZZER -Icsrc
//   csrc/fuzz/rans_fuzz.cpp g++ -std=c++17 -g -O1 -fsanitize=address,undefined -Icsrc csrc/fuzz/rans_fuzz.cpp
//   && ./a.out FILE...
// The second form prints, for each file, "sound" or what is wrong with it.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

#include "cpu/rans_decoder.h"
#include "cpu/rans_encoder.h"

using namespace gaugekit::rans;

namespace {

// A valid file may hold far more than its own size (a constant tensor); that is slow to fuzz, not wrong.
constexpr uint64_t kMaxDecodedBytes = uint64_t(1) << 26;

const std::vector<gaugekit::Isa> kPaths = [] {
  std::vector<gaugekit::Isa> paths;
  for (int path = 0; path <= int(gaugekit::isa()); ++path) paths.push_back(gaugekit::Isa(path));
  return paths;
}();

void require(bool holds) {
  if (!holds) std::abort();
}

// Through every path; all must agree on whether the blob is sound, and on every byte of what it holds.
const char* open_and_decode(const uint8_t* data, size_t size) {
  Blob blob{};
  if (const char* error = open_blob(data, size, blob)) return error;
  if (blob.count * blob.width > kMaxDecodedBytes) return nullptr;
  for (uint64_t i = 0; i < blob.chunks; ++i) {
    const uint64_t n = blob.symbols(i);
    const uint64_t bytes = n * blob.width;
    std::unique_ptr<uint8_t[]> first(new uint8_t[bytes]), other(new uint8_t[bytes]);
    const char* error = decode_chunk(blob, i, first.get(), kPaths[0]);
    for (size_t path = 1; path < kPaths.size(); ++path) {
      const char* also = decode_chunk(blob, i, other.get(), kPaths[path]);
      require((error == nullptr) == (also == nullptr));
      require(error || std::memcmp(first.get(), other.get(), bytes) == 0);
    }
    if (error) return error;
  }
  return nullptr;
}

void encode_and_decode(const uint8_t* data, size_t size, int element, int model) {
  const int width = element_bytes(element);
  const uint64_t n = size / width;
  if (n == 0 || chunk_count(n, kMaxChunkLog2) != 1) return;
  const uint64_t first = padded(kHeaderBytes + 8) + kIndexEntryBytes;
  std::vector<uint8_t> coded[2];
  for (gaugekit::Isa path : kPaths) {
    std::vector<uint8_t>& blob_bytes = coded[path != kPaths[0]];
    blob_bytes.assign(first + padded(n * width), 0);
    EncoderScratch scratch;
    ChunkEntry entry = encode_chunk(data, n, element, model, blob_bytes.data() + first, scratch, path);
    entry.offset = first;
    blob_bytes.resize(first + entry.length);
    const int64_t shape = int64_t(n);
    write_header(blob_bytes.data(), blob_bytes.size(), element, model, kMaxChunkLog2, &shape, 1, n, &entry,
                 1);
    require(path == kPaths[0] || coded[0] == coded[1]);
  }
  for (gaugekit::Isa path : kPaths) {
    Blob blob{};
    std::vector<uint8_t> decoded(n * width);
    require(open_blob(coded[0].data(), coded[0].size(), blob) == nullptr);
    require(decode_chunk(blob, 0, decoded.data(), path) == nullptr);
    require(std::memcmp(decoded.data(), data, n * width) == 0);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  open_and_decode(data, size);
  encode_and_decode(data, size, kBFloat16, kExponent);
  encode_and_decode(data, size, kFloat16, kHighByte);
  encode_and_decode(data, size, kFloat32, kExponent);
  encode_and_decode(data, size, kFloat32, kHighByte);
  encode_and_decode(data, size, kBFloat16, kExponentAndTwo);
  encode_and_decode(data, size, kInt8, kHighByte);
  return 0;
}

#ifndef GAUGEKIT_LIBFUZZER
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> read{std::istreambuf_iterator<char>(file), {}};
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[read.size()]);  // exact, so that one byte too far is seen
    std::copy(read.begin(), read.end(), bytes.get());
    LLVMFuzzerTestOneInput(bytes.get(), read.size());
    const char* error = open_and_decode(bytes.get(), read.size());
    std::printf("%s\n", error ? error : "sound");
  }
}
#endif
