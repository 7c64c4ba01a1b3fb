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

const char* open_and_decode(const uint8_t* data, size_t size) {
  Blob blob{};
  if (const char* error = open_blob(data, size, blob)) return error;
  if (blob.count * blob.width > kMaxDecodedBytes) return nullptr;
  for (uint64_t i = 0; i < blob.chunks; ++i) {
    const uint64_t n = blob.symbols(i);
    std::unique_ptr<uint8_t[]> out(new uint8_t[n * blob.width]);
    if (const char* error = decode_chunk(blob, i, out.get())) return error;
  }
  return nullptr;
}

void require(bool holds) {
  if (!holds) std::abort();
}

void encode_and_decode(const uint8_t* data, size_t size, int element, int model) {
  const int width = element_bytes(element);
  const uint64_t n = size / width;
  if (n == 0 || chunk_count(n, kMaxChunkLog2) != 1) return;
  const uint64_t first = padded(kHeaderBytes + 8) + kIndexEntryBytes;
  std::vector<uint8_t> coded(first + padded(n * width)), decoded(n * width);
  EncoderScratch scratch;
  ChunkEntry entry = encode_chunk(data, n, element, model, coded.data() + first, scratch);
  entry.offset = first;
  coded.resize(first + entry.length);
  const int64_t shape = int64_t(n);
  write_header(coded.data(), coded.size(), element, model, kMaxChunkLog2, &shape, 1, n, &entry, 1);
  Blob blob{};
  require(open_blob(coded.data(), coded.size(), blob) == nullptr);
  require(decode_chunk(blob, 0, decoded.data()) == nullptr);
  require(std::memcmp(decoded.data(), data, n * width) == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  open_and_decode(data, size);
  encode_and_decode(data, size, kBFloat16, kExponent);
  encode_and_decode(data, size, kFloat16, kHighByte);
  encode_and_decode(data, size, kFloat32, kExponent);
  encode_and_decode(data, size, kFloat32, kHighByte);
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
