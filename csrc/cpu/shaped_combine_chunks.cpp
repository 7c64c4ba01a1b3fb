// The kernel that sums chunks for shaped_combine: see the header.
#include "cpu/shaped_combine_chunks.h"

namespace gaugekit {
namespace {

// Added as the sweeps add them: keys first to last, queries last to first.
template <class S, int W>
GAUGEKIT_INLINE void chunk_sums_of(const ChunkSums<S>& f, const Sequence& s, Span chunks, Span units) {
  using A = accumulator<S>;
  const int64_t width = f.shape.width;
  for (int64_t c = chunks.first; c < chunks.last; ++c) {
    RunningSum<A, W> sums(units.count() * width, false);
    const auto add = [&](int64_t row, A scale) __attribute__((always_inline)) {
      for (int64_t u = units.first; u < units.last; ++u)
        sums.add((u - units.first) * width, f.rows.at(s.batch, u, row), scale, width);
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

}  // namespace

GAUGEKIT_SWEEP(chunk_sums, chunk_sums_of, ChunkSums)

}  // namespace gaugekit
