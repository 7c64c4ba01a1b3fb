// gaugekit::rans_decode_rows on the CPU: the GPU's code (common/rans_lane.h) with the lanes of a warp one
// after another. It is there to test that code; rans_decode is the fast way.
#include "rans_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace gaugekit::rans {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void rans_decode_rows(const Tensor& packed, const Tensor& rows, Tensor out, Tensor damaged, int64_t variant) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      rows.scalar_type() == ScalarType::Byte && rows.is_contiguous() &&
                      out.scalar_type() == ScalarType::Byte && out.is_contiguous() &&
                      damaged.scalar_type() == ScalarType::Int && damaged.is_contiguous(),
                  "packed, rows, out: expected contiguous uint8 tensors, damaged: int32");
  STD_TORCH_CHECK(variant == 0 || variant == 1, "variant: expected 0 or 1, got ", variant);
  const int64_t chunks = rows.numel() / int64_t(sizeof(ChunkRow));
  STD_TORCH_CHECK(rows.numel() == chunks * int64_t(sizeof(ChunkRow)) && damaged.numel() == chunks,
                  "rows, damaged: expected 48 bytes and one number a chunk");
  const uint8_t* data = static_cast<const uint8_t*>(packed.const_data_ptr());
  const uint8_t* row = static_cast<const uint8_t*>(rows.const_data_ptr());
  for (int64_t i = 0; i < chunks; ++i)
    static_cast<int32_t*>(damaged.mutable_data_ptr())[i] =
        !decode_row(load<ChunkRow>(row + i * sizeof(ChunkRow)), data, packed.numel(),
                    static_cast<uint8_t*>(out.mutable_data_ptr()), out.numel(), variant == 1);
}

}  // namespace
}  // namespace gaugekit::rans

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("rans_decode_rows", TORCH_BOX(&gaugekit::rans::rans_decode_rows));
}
