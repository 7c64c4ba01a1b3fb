// What the kernels of a projection whose gauge is fixed are given: the inputs of every head, and rows in
// memory.
#pragma once

#include <vector>

#include "common/check.h"

namespace gaugekit {

constexpr int64_t THREAD_PRODUCTS = 1 << 20;  // that are worth a thread: some thirty microseconds

// The inputs of every head, own ones first: [heads][inputs].
struct Inputs {
  std::vector<int32_t> places;
  int64_t inputs, width;

  Inputs(const Tensor& rows, int64_t inputs) : inputs(inputs), width(rows.size(1)) {
    const Tensor held = rows.is_contiguous() ? rows : torch::stable::contiguous(rows);
    const int32_t* own = held.const_data_ptr<int32_t>();
    const int64_t heads = rows.size(0);
    places.resize(heads * inputs + 1);
    std::vector<uint8_t> taken(inputs, 0);
    for (int64_t h = 0; h < heads; ++h, own += width) {
      int32_t* to = places.data() + h * inputs;
      for (int64_t i = 0; i < width; ++i) {
        STD_TORCH_CHECK(0 <= own[i] && own[i] < inputs && !taken[own[i]],
                        "rows: expected different inputs for each head, 0 to D - 1");
        taken[own[i]] = 1, *to++ = own[i];
      }
      // Written without a branch: an input that is taken falls behind the list, where the next one is
      // written.
      for (int64_t i = 0; i < inputs; ++i) *to = static_cast<int32_t>(i), to += 1 - taken[i];
      for (int64_t i = 0; i < width; ++i) taken[own[i]] = 0;
    }
  }
  const int32_t* own(int64_t head) const { return places.data() + head * inputs; }
  const int32_t* others(int64_t head) const { return own(head) + width; }
};

// A tensor's rows, for all axes before the last: how far they stand apart, -1 where that is no one distance.
inline int64_t row_distance(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  int64_t row = 0, count = 1;
  if (x.size(last) > 1 && x.stride(last) != 1) return -1;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (count == 1) row = x.stride(i);
    if (x.stride(i) != row * count) return -1;
    count *= x.size(i);
  }
  return row;
}

// Calls to torch cost as much as a token of a small head: none is made for what is dense already.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

}  // namespace gaugekit
