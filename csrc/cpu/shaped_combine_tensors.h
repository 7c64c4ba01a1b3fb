// What the operators of shaped attention read from their tensors: rows, sequences and dtypes.
#pragma once

#include "common/check.h"
#include "cpu/shaped_combine_rows.h"

namespace gaugekit {

constexpr int64_t FAR = int64_t(1) << 40;  // keeps sums of positions and windows from overflowing

template <class S, class T>
Rows<S> rows(const T& x) {
  return {static_cast<S*>(const_cast<void*>(x.const_data_ptr())), {x.stride(0), x.stride(1), x.stride(2)}};
}

inline std::vector<Sequence> sequences(const Shape& shape, int64_t batch, int64_t queries, int64_t keys,
                                       const Optional& query_start, const Optional& key_lengths,
                                       const Optional& cu_seqlens) {
  std::vector<Sequence> found;
  int64_t chunks = 0;
  const auto put = [&](Sequence one) {
    one.chunks_before = chunks;
    chunks += shape.chunks(one);
    found.push_back(one);
  };
  if (cu_seqlens) {
    check_dtype("cu_seqlens", *cu_seqlens, ScalarType::Int);
    STD_TORCH_CHECK(batch == 1 && queries == keys && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                    "cu_seqlens: expected B = 1, T = S and at least one entry");
    const Tensor held = torch::stable::contiguous(*cu_seqlens);
    const int32_t* bounds = held.const_data_ptr<int32_t>();
    const int64_t count = held.size(0) - 1;
    STD_TORCH_CHECK(bounds[0] == 0 && bounds[count] == queries, "cu_seqlens: expected to run from 0 to T");
    for (int64_t i = 0; i < count; ++i) {
      const int64_t length = int64_t(bounds[i + 1]) - bounds[i];
      STD_TORCH_CHECK(length >= 0, "cu_seqlens: expected values that never fall");
      put({0, bounds[i], length, bounds[i], length, 0, 0});
    }
    return found;
  }
  const auto entries = [&](const char* name, const Optional& given, int64_t absent) {
    std::vector<int64_t> values(batch, absent);
    if (given) {
      check_dtype(name, *given, ScalarType::Long);
      check_shape(name, *given, {batch});
      for (int64_t b = 0; b < batch; ++b) values[b] = given->const_data_ptr<int64_t>()[b * given->stride(0)];
    }
    return values;
  };
  const std::vector<int64_t> start = entries("query_start", query_start, shape.causal ? keys - queries : 0);
  const std::vector<int64_t> length = entries("key_lengths", key_lengths, keys);
  for (int64_t b = 0; b < batch; ++b)
    put({b, 0, queries, 0, std::min(std::max<int64_t>(length[b], 0), keys),
         std::min(std::max(start[b], -FAR), FAR), 0});
  return found;
}

template <class Run>
void dispatch(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Float16{});
    default:
      STD_TORCH_CHECK(false, "a: expected float32, float64, bfloat16 or float16");
  }
}

// A new tensor laid out as x is, or densely where that would leave the last axis with a stride. The
// operators' fakes (ops/shaped_combine.py) say the same.
inline Tensor rows_like(const Tensor& x) {
  Tensor made = torch::stable::empty_like(x);
  return made.size(3) <= 1 || made.stride(3) == 1 ? made : torch::stable::new_empty(x, x.sizes());
}

}  // namespace gaugekit
