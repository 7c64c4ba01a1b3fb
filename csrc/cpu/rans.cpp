// gaugekit::rans_encode, rans_open, rans_decode and crc32c on the CPU: chunks in parallel, then the
// registration.
#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "common/turns.h"
#include "rans_decoder.h"
#include "rans_places.h"

namespace gaugekit::rans {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// About what an element's byte takes, coded and decoded: good enough to tell when a thread is worth calling.
constexpr double kEncodeNs = 0.8, kDecodeNs = 0.4;

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

// Codes `count` elements at `in` into `out` (room for the header, the index and every chunk stored raw) and
// returns the bytes written.
uint64_t encode_blob(const uint8_t* in, uint64_t count, int element, int model, int chunk_log2,
                     const int64_t* shape, int rank, uint8_t* out, const NewPages& pages, Isa path) {
  const uint64_t width = element_bytes(element), chunks = chunk_count(count, chunk_log2);
  std::vector<ChunkEntry> entries(chunks);
  Places places(padded(kHeaderBytes + 8 * uint64_t(rank)) + chunks * kIndexEntryBytes, chunks);
  auto elements = [&](uint64_t i) {
    const uint64_t first = i << chunk_log2;
    return Elements{in + first * width, i + 1 == chunks ? count - first : uint64_t(1) << chunk_log2};
  };
  const uint64_t threads = std::min<uint64_t>(chunks, torch::stable::get_num_threads());
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
const char* decode_blob(const Blob& blob, uint64_t start, uint64_t stop, uint8_t* out, Isa path) {
  if (start == stop) return nullptr;
  const uint64_t last_chunk = blob.chunks - 1;
  const uint64_t from = std::min(start >> blob.chunk_log2, last_chunk);
  const uint64_t to = std::min((stop - 1) >> blob.chunk_log2, last_chunk) + 1;
  const uint64_t threads = torch::stable::get_num_threads();
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

void check_bytes(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.dim() == 1 && tensor.is_contiguous(),
                  name, ": expected a contiguous one-dimensional uint8 tensor");
}

// 0 portable, 1 AVX2, 2 AVX-512, 3 with VBMI2, or the widest the processor has where that is less; -1 that
// widest.
Isa chosen(int64_t path) {
  STD_TORCH_CHECK(-1 <= path && path <= 3, "path: expected -1 to 3");
  return path < 0 ? isa() : std::min(Isa(path), isa());
}

Blob opened(const Tensor& blob) {
  check_bytes(blob, "blob");
  Blob result{};
  const char* error = open_blob(static_cast<const uint8_t*>(blob.const_data_ptr()), blob.numel(), result);
  STD_TORCH_CHECK(error == nullptr, "corrupt blob: ", error);
  return result;
}

Tensor rans_encode(const Tensor& data, const Tensor& shape, int64_t element, int64_t model,
                   int64_t chunk_log2, int64_t path) {
  check_bytes(data, "data");
  STD_TORCH_CHECK(shape.scalar_type() == ScalarType::Long && shape.dim() == 1 && shape.is_contiguous() &&
                      shape.numel() <= kMaxRank,
                  "shape: expected an int64 vector of at most 64 entries");
  STD_TORCH_CHECK(element_bytes(int(element)) && model_applies(int(element), int(model)),
                  "element, model: this pair of ids is not supported");
  STD_TORCH_CHECK(chunk_log2 >= kMinChunkLog2 && chunk_log2 <= kMaxChunkLog2,
                  "chunk_log2: expected 14 to 20");
  const uint64_t width = element_bytes(int(element)), bytes = data.numel(), count = bytes / width;
  STD_TORCH_CHECK(bytes % width == 0, "data: expected whole elements");
  const uint64_t chunks = chunk_count(count, int(chunk_log2));
  const uint64_t bound = padded(kHeaderBytes + 8 * shape.numel()) + chunks * (kIndexEntryBytes + 16) + bytes;
  Tensor out = torch::stable::empty({int64_t(bound)}, ScalarType::Byte);
  const NewPages pages(out.mutable_data_ptr(), bound);
  const uint64_t size =
      encode_blob(static_cast<const uint8_t*>(data.const_data_ptr()), count, int(element), int(model),
                  int(chunk_log2), static_cast<const int64_t*>(shape.const_data_ptr()), int(shape.numel()),
                  static_cast<uint8_t*>(out.mutable_data_ptr()), pages, chosen(path));
  return torch::stable::narrow(out, 0, 0, int64_t(size));
}

Tensor rans_open(const Tensor& tensor) {
  const Blob blob = opened(tensor);
  Tensor out = torch::stable::empty({4 + blob.rank}, ScalarType::Long);
  int64_t* p = static_cast<int64_t*>(out.mutable_data_ptr());
  p[0] = blob.element;
  p[1] = blob.model;
  p[2] = blob.chunk_log2;
  p[3] = int64_t(blob.count);
  for (int i = 0; i < blob.rank; ++i) p[4 + i] = int64_t(blob.dim(i));
  return out;
}

void rans_decode(const Tensor& tensor, int64_t start, int64_t stop, Tensor out, int64_t path) {
  const Blob blob = opened(tensor);
  check_bytes(out, "out");
  STD_TORCH_CHECK(0 <= start && start <= stop && uint64_t(stop) <= blob.count,
                  "start, stop: not a range of the blob");
  STD_TORCH_CHECK(out.numel() == (stop - start) * blob.width, "out: expected the bytes of the range");
  const char* error =
      decode_blob(blob, start, stop, static_cast<uint8_t*>(out.mutable_data_ptr()), chosen(path));
  STD_TORCH_CHECK(error == nullptr, "corrupt blob: ", error);
}

Tensor crc32c_bytes(const Tensor& data, int64_t crc) {
  check_bytes(data, "data");
  Tensor out = torch::stable::empty({}, ScalarType::Long);
  *static_cast<int64_t*>(out.mutable_data_ptr()) =
      crc32c(static_cast<const uint8_t*>(data.const_data_ptr()), data.numel(), uint32_t(crc));
  return out;
}

}  // namespace
}  // namespace gaugekit::rans

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("rans_encode", TORCH_BOX(&gaugekit::rans::rans_encode));
  m.impl("rans_open", TORCH_BOX(&gaugekit::rans::rans_open));
  m.impl("rans_decode", TORCH_BOX(&gaugekit::rans::rans_decode));
  m.impl("crc32c", TORCH_BOX(&gaugekit::rans::crc32c_bytes));
}
