// gaugekit::rans_decode_rows on the CPU: the GPU's code (common/rans_lane.h) with the lanes of a warp one
// after another. It is there to test that code; rans_decode is the fast way.
#include "rans_rows.h"

#include "common/rans_check.h"

namespace gaugekit::rans {
namespace {

void rans_decode_rows(const Tensor& packed, const Tensor& rows, Tensor out, Tensor damaged, int64_t variant) {
  const int64_t chunks = check_rows(packed, rows, out, damaged, variant);
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
