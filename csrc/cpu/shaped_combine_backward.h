// The gradients of shaped_combine in one sweep over the keys, last to first. Free of torch.
//
// Key j receives -gamma sum grad_t / n_t over the queries t that see it; those queries form a window whose
// ends only move backward, so the forward sweep's running sum serves again, chunk by chunk from the last.
#pragma once

#include "cpu/shaped_combine_rows.h"

namespace gaugekit {

enum Gain { ALPHA, BETA, GAMMA, LAMBDA, GAIN_COUNT };

template <class S>
struct Backward {
  using A = accumulator<S>;
  Shape shape;
  Gains<A> gains;
  Rows<const S> grad, a, v, v0;
  Rows<S> da, dv, dv0;
  double* partial;               // [chunks, heads, GAIN_COUNT], each entry written by one thread
  const double* sums = nullptr;  // [chunks, heads, V] of grad / n after each chunk, where they are known
};

// The keys of some chunks of a sequence and the queries that start to be seen there, for some groups.
template <class S>
void shaped_combine_backward(const Backward<S>& f, const Sequence& s, Span chunks, Span groups);

}  // namespace gaugekit
