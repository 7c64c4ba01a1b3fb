// O = beta A + alpha V - gamma C V + lambda (V0 - V) in one sweep over the queries. Free of torch.
#pragma once

#include "cpu/shaped_combine_rows.h"

namespace gaugekit {

template <class S>
struct Forward {
  using A = accumulator<S>;
  Shape shape;
  Gains<A> gains;
  Rows<const S> a, v, v0;
  Rows<S> out;                   // may be a itself
  const double* sums = nullptr;  // [chunks, groups, V] of the keys before each chunk, where they are known
};

// The queries of some chunks of a sequence, for some heads.
template <class S>
void shaped_combine(const Forward<S>& f, const Sequence& s, Span chunks, Span heads);

}  // namespace gaugekit
