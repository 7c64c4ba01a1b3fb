// What a call of attention from one cache is given, on any device.
#pragma once

#include "common/check.h"

namespace gaugekit {

struct CacheArguments {
  const Tensor &q, &cache;  // [B, H, T, C] and [B, G, S, C], or pages of S rows
  bool slices;
  const Optional &alpha, &beta, &gamma, &key_gain, &cos, &sin;
  bool causal;
  const std::optional<int64_t>& window;
  const Optional &query_start, &key_lengths, &block_table;

  int64_t repeats() const { return q.size(1) / cache.size(1); }
  int64_t width() const { return slices ? q.size(3) / repeats() : q.size(3); }
  int64_t keys() const { return cache.size(2) * (block_table ? block_table->size(1) : 1); }
};

}  // namespace gaugekit
