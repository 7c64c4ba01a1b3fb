// Sums of whole chunks of shaped_combine, so that chunks can be worked on side by side. Free of torch.
#pragma once

#include "cpu/shaped_combine_rows.h"

namespace gaugekit {

// The rows of V that are keys or, `weighted`, those of grad each over the number n of keys its query sees.
template <class S>
struct ChunkSums {
  Shape shape;
  Rows<const S> rows;
  bool weighted;
  int64_t units;  // heads of the rows: G, or H if weighted
  double* sums;   // [chunks, units, V]
};

// Of some chunks and units; added as the sweeps add them: keys first to last, queries last to first.
template <class S>
void chunk_sums(const ChunkSums<S>& f, const Sequence& s, Span chunks, Span units);

// Sums of the chunks before each (causal: of keys; `weighted`: of queries after it), or of all; in place.
template <class S>
void chunk_bases(const ChunkSums<S>& f, const Sequence& s) {
  const int64_t chunks = f.shape.chunks(s), columns = f.units * f.shape.width;
  double* const sums = f.sums + s.chunks_before * columns;
  std::vector<double> base(columns, 0.0);
  for (int64_t i = 0; i < chunks; ++i) {
    double* const here = sums + (f.weighted ? chunks - 1 - i : i) * columns;
    for (int64_t k = 0; k < columns; ++k) {
      const double own = here[k];
      here[k] = base[k];
      base[k] += own;
    }
  }
  for (int64_t i = 0; f.shape.open() && i < chunks; ++i)
    std::copy(base.begin(), base.end(), sums + i * columns);
}

}  // namespace gaugekit
