// Feeds arbitrary bytes to the parser and the decoders of coded blobs, as they are and with their checksums
// made right, and as elements to the encoder.
//   clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -DGAUGEKIT_LIBFUZZER -Icsrc
//   csrc/fuzz/rans_fuzz.cpp g++ -std=c++17 -g -O1 -fsanitize=address,undefined -Icsrc csrc/fuzz/rans_fuzz.cpp
// Without libFuzzer: a.out FILE... prints for each file "sound" or what is wrong with it; a.out --mutate
// SECONDS [SEED] feeds mutations of sound blobs for so long and prints how many; a.out --digest prints a
// digest of those sound blobs.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <vector>

#include "cpu/rans_decoder.h"
#include "cpu/rans_rows.h"
#include "rans_mutator.h"

using namespace gaugekit::rans;

namespace {

// A valid file may hold far more than its own size (a constant tensor); that is slow to fuzz, not wrong.
constexpr uint64_t kMaxDecodedBytes = uint64_t(1) << 22;

const std::vector<gaugekit::Isa> kPaths = [] {
  std::vector<gaugekit::Isa> paths;
  constexpr int kForms = 4;  // levels for which there is a form here
  const int widest = std::min(int(gaugekit::isa()), kForms - 1);
  for (int path = 0; path <= widest; ++path) paths.push_back(gaugekit::Isa(path));
  return paths;
}();

void require(bool holds) {
  if (!holds) std::abort();
}

// The chunk as a GPU would decode it. What the decoders above take for sound it must decode to the same
// bytes.
void decode_by_lanes(const Blob& blob, uint64_t i, const uint8_t* expected) {
  const ChunkEntry e = blob.entry(i);
  const uint64_t n = blob.symbols(i), bytes = n * blob.width;
  // Its own allocation, aligned and exact, so that a lane that leaves it is seen.
  std::unique_ptr<uint8_t[]> chunk(new uint8_t[e.length]), out(new uint8_t[bytes]), other(new uint8_t[bytes]);
  std::memcpy(chunk.get(), blob.data + e.offset, e.length);
  const ChunkRow row{0,
                     0,
                     uint32_t(n),
                     0,
                     uint32_t(n),
                     e.length,
                     {e.words[0], e.words[1]},
                     e.symbols,
                     e.method,
                     e.constant,
                     uint8_t(blob.width),
                     uint8_t(chunk_model(e, blob.model)),
                     0};
  const bool sound = decode_row(row, chunk.get(), e.length, out.get(), bytes, false);
  const bool also = decode_row(row, chunk.get(), e.length, other.get(), bytes, true);
  require(sound == also && (!sound || std::memcmp(out.get(), other.get(), bytes) == 0));
  require(!expected || (sound && std::memcmp(out.get(), expected, bytes) == 0));
}

// Two chunks at a time, where they are decoded so: as each of them alone.
void decode_twos(const Blob& blob) {
  for (uint64_t i = 0; i + 1 < blob.chunks; ++i) {
    const uint64_t first = blob.symbols(i) * blob.width, bytes = first + blob.symbols(i + 1) * blob.width;
    std::unique_ptr<uint8_t[]> out(new uint8_t[bytes]), other(new uint8_t[bytes]);
    const char* error = decode_chunk(blob, i, out.get(), kPaths.back());
    const char* second = decode_chunk(blob, i + 1, out.get() + first, kPaths.back());
    const char* also = decode_two_chunks(blob, i, other.get(), kPaths.back());
    require(also == (error ? error : second));
    require(also || std::memcmp(out.get(), other.get(), bytes) == 0);
  }
}

// Through every path; all must agree on whether the blob is sound, and on every byte of what it holds.
const char* open_and_decode(const uint8_t* data, size_t size) {
  Blob blob{};
  if (const char* error = open_blob(data, size, blob)) return error;
  if (blob.count > kMaxDecodedBytes / blob.width) return nullptr;
  decode_twos(blob);
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
    decode_by_lanes(blob, i, error ? nullptr : first.get());
    if (error) return error;
  }
  return nullptr;
}

void encode_and_decode(const uint8_t* data, size_t size, Kind kind) {
  const int width = element_bytes(kind.element);
  const uint64_t n = size / width;
  if (n == 0 || chunk_count(n, kMaxChunkLog2) != 1) return;
  const Bytes coded = blob_of(data, n, kind, kMaxChunkLog2, kPaths[0]);
  for (gaugekit::Isa path : kPaths) {
    require(blob_of(data, n, kind, kMaxChunkLog2, path) == coded);
    Blob blob{};
    Bytes decoded(n * width);
    require(open_blob(coded.data(), coded.size(), blob) == nullptr);
    require(decode_chunk(blob, 0, decoded.data(), path) == nullptr);
    require(std::memcmp(decoded.data(), data, n * width) == 0);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  open_and_decode(data, size);
  Bytes sealed(data, data + size);
  reseal(sealed);
  std::unique_ptr<uint8_t[]> exact(new uint8_t[size]);  // so that one byte too far is seen
  std::copy(sealed.begin(), sealed.end(), exact.get());
  open_and_decode(exact.get(), size);
  if (size < 4096)
    for (Kind kind : kKinds) encode_and_decode(data, size, kind);
  return 0;
}

#ifndef GAUGEKIT_LIBFUZZER
namespace {

int mutate(double seconds, uint64_t seed) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  Mutator mutator(seed);
  uint64_t inputs = 0, opened = 0, sound = 0;
  for (; Clock::now() < end; ++inputs) {
    Bytes bytes = mutator.next();
    if (inputs % 64 == 0) {
      LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
      continue;
    }
    reseal(bytes);
    std::unique_ptr<uint8_t[]> exact(new uint8_t[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), exact.get());
    Blob blob{};
    opened += open_blob(exact.get(), bytes.size(), blob) == nullptr;
    sound += open_and_decode(exact.get(), bytes.size()) == nullptr;
  }
  std::printf("%llu inputs, %llu reached the decoders, %llu decoded; nothing wrong\n",
              (unsigned long long)inputs, (unsigned long long)opened, (unsigned long long)sound);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::strcmp(argv[1], "--mutate") == 0)
    return mutate(std::atof(argv[2]), argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0);
  if (argc > 1 && std::strcmp(argv[1], "--digest") == 0) return std::printf("%u\n", Mutator(1).digest()) < 0;
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> read{std::istreambuf_iterator<char>(file), {}};
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[read.size()]);
    std::copy(read.begin(), read.end(), bytes.get());
    LLVMFuzzerTestOneInput(bytes.get(), read.size());
    const char* error = open_and_decode(bytes.get(), read.size());
    std::printf("%s\n", error ? error : "sound");
  }
}
#endif
