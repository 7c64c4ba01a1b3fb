// Checks of tensors at the edge of a kernel, on LibTorch's stable ABI. The public Python functions have said
// more about bad input already; these keep a direct call of the operator from reading outside memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace gaugekit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (int64_t size : sizes) same = same && x.size(axis++) == size;
  STD_TORCH_CHECK(same, name, ": expected another shape beside the other arguments");
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, name, ": expected another dtype beside the other arguments");
}

// The tensor itself where its last axis is contiguous, else a contiguous copy.
inline Tensor with_contiguous_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace gaugekit
