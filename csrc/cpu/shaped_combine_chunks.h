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

// Added as the sweeps add them: keys first to last, queries last to first.
template <class S, int W>
GAUGEKIT_INLINE void chunk_sums_of(const ChunkSums<S>& f, const Sequence& s, Span chunks, Span units) {
  using A = accumulator<S>;
  const int64_t width = f.shape.width;
  for (int64_t c = chunks.first; c < chunks.last; ++c) {
    RunningSum<A> sums(units.count() * width, false);
    const auto add = [&](int64_t row, A scale) __attribute__((always_inline)) {
      for (int64_t u = units.first; u < units.last; ++u)
        sums.template add<W>((u - units.first) * width, f.rows.at(s.batch, u, row), scale, width);
      sums.row_done();
    };
    if (f.weighted) {
      const Span queries = queries_of_chunk(f.shape, s, c);
      for (int64_t t = queries.last; t-- > queries.first;) {
        const int64_t seen = keys_of(f.shape, s, t).count();
        if (seen) add(s.first_query + t, A(1) / static_cast<A>(seen));
      }
    } else {
      const Span keys = keys_of_chunk(f.shape, s, c);
      for (int64_t j = keys.first; j < keys.last; ++j) add(s.first_key + j, A(1));
    }
    sums.flush();
    std::copy(sums.total.begin(), sums.total.end(),
              f.sums + ((s.chunks_before + c) * f.units + units.first) * width);
  }
}

GAUGEKIT_KERNEL(chunk_sums, chunk_sums_of, ChunkSums)

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
