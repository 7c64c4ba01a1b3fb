// gaugekit::rans_encode, rans_open, rans_decode and crc32c on the CPU: what they take is
// checked, then the registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "rans_blob.h"

namespace gaugekit::rans {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
                   int64_t chunk_log2, int64_t path, int64_t front) {
  check_bytes(data, "data");
  STD_TORCH_CHECK(shape.scalar_type() == ScalarType::Long && shape.dim() == 1 && shape.is_contiguous() &&
                      shape.numel() <= kMaxRank,
                  "shape: expected an int64 vector of at most 64 entries");
  STD_TORCH_CHECK(element_bytes(int(element)) && model_applies(int(element), int(model)),
                  "element, model: this pair of ids is not supported");
  STD_TORCH_CHECK(chunk_log2 >= kMinChunkLog2 && chunk_log2 <= kMaxChunkLog2,
                  "chunk_log2: expected 14 to 20");
  STD_TORCH_CHECK(front >= 0 && front % 16 == 0, "front: expected a multiple of 16");
  const uint64_t width = element_bytes(int(element)), bytes = data.numel(), count = bytes / width;
  STD_TORCH_CHECK(bytes % width == 0, "data: expected whole elements");
  const uint64_t bound = most_bytes(bytes, int(element), int(chunk_log2), int(shape.numel()));
  Tensor out = torch::stable::empty({front + int64_t(bound)}, ScalarType::Byte);
  uint8_t* blob = static_cast<uint8_t*>(out.mutable_data_ptr()) + front;
  const NewPages pages(blob, bound);
  const uint64_t size =
      encode_blob(static_cast<const uint8_t*>(data.const_data_ptr()), count, int(element), int(model),
                  int(chunk_log2), static_cast<const int64_t*>(shape.const_data_ptr()), int(shape.numel()),
                  blob, pages, torch::stable::get_num_threads(), chosen(path));
  return torch::stable::narrow(out, 0, 0, front + int64_t(size));
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
  const char* error = decode_blob(blob, start, stop, static_cast<uint8_t*>(out.mutable_data_ptr()),
                                  torch::stable::get_num_threads(), chosen(path));
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
