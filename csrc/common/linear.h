// Torch's own product, for the parts of a kernel that are plain matrices.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>

#include "common/check.h"

namespace gaugekit {

// A matrix on memory that somebody else holds: without history, so that any thread may hand it to an
// operator.
inline Tensor matrix(const void* memory, ScalarType dtype, int64_t rows, int64_t columns,
                     int64_t row_stride) {
  return torch::stable::from_blob(const_cast<void*>(memory), {rows, columns}, {row_stride, 1},
                                  torch::headeronly::DeviceType::CPU, dtype);
}

// This overload is left alone by autocast.
inline void linear_into(const Tensor& out, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace gaugekit
