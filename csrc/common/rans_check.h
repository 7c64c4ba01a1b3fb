// The check of gaugekit::rans_decode_rows' arguments, the same on every device; on LibTorch's stable ABI.
#pragma once

#include "common/check.h"
#include "common/rans_lane.h"

namespace gaugekit::rans {

// How many chunks `rows` holds.
inline int64_t check_rows(const Tensor& packed, const Tensor& rows, const Tensor& out, const Tensor& damaged,
                          int64_t variant) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      rows.scalar_type() == ScalarType::Byte && rows.is_contiguous() &&
                      out.scalar_type() == ScalarType::Byte && out.is_contiguous() &&
                      damaged.scalar_type() == ScalarType::Int && damaged.is_contiguous(),
                  "packed, rows, out: expected contiguous uint8 tensors, damaged: int32");
  STD_TORCH_CHECK(variant == 0 || variant == 1, "variant: expected 0 or 1, got ", variant);
  const int64_t chunks = rows.numel() / int64_t(sizeof(ChunkRow));
  STD_TORCH_CHECK(rows.numel() == chunks * int64_t(sizeof(ChunkRow)) && damaged.numel() == chunks,
                  "rows, damaged: expected 48 bytes and one number a chunk");
  return chunks;
}

}  // namespace gaugekit::rans
