// gaugekit::packed_survey, packed_encode, packed_rows and packed_linear on the CPU.
#include <atomic>
#include <limits>

#include "common/check.h"
#include "common/turns.h"
#include "packed_linear_amx.h"
#include "packed_linear_encode.h"
#include "packed_linear_outputs.h"
#include "packed_linear_tiles.h"

namespace gaugekit::packed {
namespace {

constexpr double SURVEY_NS = 0.8, ENCODE_NS = 0.8, DECODE_NS = 0.4;  // about, of a weight
constexpr int64_t PIECE_WEIGHTS = 1 << 19;  // of the product for one thread; packed, they fit its cache

// Calls body(begin, end) for ranges of rows; a weight takes about `weight_ns`.
template <class Body>
void over_rows(int64_t rows, int64_t columns, double weight_ns, const Body& body) {
  const int64_t step = grain_of_rows(columns);
  take_ranges(rows, step, torch::stable::get_num_threads(), int64_t(weight_ns * step * columns), body);
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

void check_contiguous(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), name, ": expected a contiguous CPU tensor");
}

Words words(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [N, K]");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16 || weight.scalar_type() == ScalarType::Half,
                  "weight: expected bfloat16 or float16");
  check_contiguous("weight", weight);
  return {data<uint16_t>(weight), weight.size(0), weight.size(1), weight.scalar_type() == ScalarType::Half};
}

Weight weight_of(const Tensor& raw, const Tensor& planes, const Tensor& escapes, const Tensor& offsets,
                 const Tensor& window, int64_t columns) {
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>{"raw", raw},
                                {"planes", planes},
                                {"escapes", escapes},
                                {"offsets", offsets},
                                {"window", window}})
    check_contiguous(name, x);
  check_dtype("raw", raw, ScalarType::Byte);
  check_dtype("planes", planes, ScalarType::Long);
  check_dtype("escapes", escapes, ScalarType::Byte);
  check_dtype("offsets", offsets, ScalarType::Int);
  check_dtype("window", window, ScalarType::Byte);
  STD_TORCH_CHECK(raw.dim() == 2 && planes.dim() == 3 && escapes.dim() == 1 && columns >= 0,
                  "raw, planes, escapes: expected [N, 64 B], [N, P, B] and [E]");
  const int64_t rows = raw.size(0), blocks = (columns + BLOCK - 1) / BLOCK, count = planes.size(1);
  STD_TORCH_CHECK(count == 3 || count == 4 || count == 6 || count == 7,
                  "planes: expected 3, 4, 6 or 7 a block");
  const bool e5m2 = count > 4 && blocks > 0 && raw.size(1) == 0;
  check_shape("raw", raw, {rows, e5m2 ? 0 : blocks * BLOCK});
  check_shape("planes", planes, {rows, count, blocks});
  check_shape("window", window, {rows});
  const Weight w{e5m2          ? nullptr
                 : raw.numel() ? data<uint8_t>(raw)
                               : NO_LOW_BYTES,
                 data<uint64_t>(planes),
                 data<uint8_t>(escapes),
                 data<int32_t>(offsets),
                 data<uint8_t>(window),
                 rows,
                 blocks,
                 escapes.numel(),
                 count};
  check_shape("offsets", offsets, {rows * w.segments() + 1});
  return w;
}

Tensor survey(const Tensor& weight) {
  const Words w = words(weight);
  Tensor out = torch::stable::new_empty(weight, {w.rows, 2, 2}, ScalarType::Int);
  int32_t* to = static_cast<int32_t*>(out.mutable_data_ptr());
  over_rows(w.rows, w.columns, SURVEY_NS, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Survey found = survey_row(w, row, isa());
      for (int c = 0; c < 2; ++c)
        to[row * 4 + 2 * c] = found.window[c], to[row * 4 + 2 * c + 1] = found.escapes[c];
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encode(const Tensor& weight, const Tensor& window,
                                                  const Tensor& begins, int64_t code_bits,
                                                  int64_t escape_count) {
  const Words w = words(weight);
  check_dtype("window", window, ScalarType::Byte);
  check_shape("window", window, {w.rows});
  check_dtype("begins", begins, ScalarType::Long);
  check_shape("begins", begins, {w.rows + 1});
  check_contiguous("window", window);
  check_contiguous("begins", begins);
  STD_TORCH_CHECK(code_bits == 3 || code_bits == 4, "code_bits: expected 3 or 4");
  STD_TORCH_CHECK(0 <= escape_count && escape_count <= INT32_MAX, "escape_count: expected at most 2^31 - 1");
  const int64_t blocks = (w.columns + BLOCK - 1) / BLOCK, planes = code_bits + (w.half ? 3 : 0);
  const int64_t segments = (blocks + SEGMENT_BLOCKS - 1) / SEGMENT_BLOCKS;
  const int64_t* start = data<int64_t>(begins);
  for (int64_t row = 0; row < w.rows; ++row)
    STD_TORCH_CHECK(0 <= start[row] && start[row] <= start[row + 1] && start[row + 1] <= escape_count,
                    "begins: expected values that never fall, from 0 to escape_count");
  Tensor raw = torch::stable::new_empty(weight, {w.rows, blocks * BLOCK}, ScalarType::Byte);
  Tensor plane = torch::stable::new_empty(weight, {w.rows, planes, blocks}, ScalarType::Long);
  Tensor escapes = torch::stable::new_zeros(weight, {escape_count}, ScalarType::Byte);
  Tensor offsets = torch::stable::new_empty(weight, {w.rows * segments + 1}, ScalarType::Int);
  uint8_t* to_raw = static_cast<uint8_t*>(raw.mutable_data_ptr());
  uint64_t* to_planes = static_cast<uint64_t*>(plane.mutable_data_ptr());
  uint8_t* to_escapes = static_cast<uint8_t*>(escapes.mutable_data_ptr());
  int32_t* to_offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  const uint8_t* base = data<uint8_t>(window);
  over_rows(w.rows, w.columns, ENCODE_NS, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Target target{to_raw + row * blocks * BLOCK, to_planes + row * planes * blocks, blocks,
                          to_escapes + start[row],       to_escapes + start[row + 1],       base[row]};
      encode_row(w.data + row * w.columns, w.columns, w.half, static_cast<int>(code_bits), target, start[row],
                 to_offsets + row * segments, isa());
    }
  });
  to_offsets[w.rows * segments] = static_cast<int32_t>(escape_count);
  return {raw, plane, escapes, offsets};
}

// Rows `index` of W (or the first ones) into out [count, columns]: words, or the bytes of E5M2.
template <class T>
void decode(const Weight& w, const int64_t* index, int64_t count, int64_t columns, T* out) {
  over_rows(count, columns, DECODE_NS, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      decode_row(w, index ? index[i] : i, columns, out + i * columns, isa());
  });
}

Tensor rows(const Optional& index, const Tensor& raw, const Tensor& planes, const Tensor& escapes,
            const Tensor& offsets, const Tensor& window, int64_t columns) {
  const Weight w = weight_of(raw, planes, escapes, offsets, window, columns);
  const int64_t* at = nullptr;
  int64_t count = w.rows;
  if (index) {
    check_dtype("index", *index, ScalarType::Long);
    check_contiguous("index", *index);
    STD_TORCH_CHECK(index->dim() == 1, "index: expected one axis");
    at = data<int64_t>(*index), count = index->size(0);
    for (int64_t i = 0; i < count; ++i)
      STD_TORCH_CHECK(0 <= at[i] && at[i] < w.rows, "index: expected rows of the packed weight, 0 to N - 1");
  }
  Tensor out =
      torch::stable::new_empty(raw, {count, columns}, w.e5m2() ? ScalarType::Float8_e5m2 : word_dtype(w));
  if (w.e5m2())
    decode(w, at, count, columns, static_cast<uint8_t*>(out.mutable_data_ptr()));
  else
    decode(w, at, count, columns, static_cast<uint16_t*>(out.mutable_data_ptr()));
  return out;
}

// Calls body(begin, end) for pieces of W's rows, multiples of `multiple` of `weights` at most. Threads take
// piece after piece: one that others hold up leaves the rest to its fellows.
template <class Body>
void over_pieces(const Weight& w, int64_t columns, int64_t weights, int64_t multiple, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads(), least = grain_of_rows(columns, multiple),
                most = weights / std::max<int64_t>(1, columns);
  const int64_t share = std::clamp(w.rows / (8 * threads), least, std::max(most, least));
  const int64_t step = (share + multiple - 1) / multiple * multiple, pieces = (w.rows + step - 1) / step;
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(threads, pieces), 1, [&](int64_t, int64_t) {
    for (int64_t piece = next++; piece < pieces; piece = next++)
      body(piece * step, std::min(w.rows, (piece + 1) * step));
  });
}

template <class S>
void fused(const Weight& w, const Tensor& x, const Optional& bias, int64_t batch, int64_t columns,
           Tensor& out) {
  const std::vector<FloatBlock> arranged = arrange(data<S>(x), batch, columns, w.blocks, w.half());
  const float* from = reinterpret_cast<const float*>(arranged.data());
  const S* shift = bias ? data<S>(*bias) : nullptr;
  S* to = static_cast<S*>(out.mutable_data_ptr());
  // For more than MAX_BATCH rows of x a piece is read again from the second-level cache.
  over_pieces(w, columns, PIECE_WEIGHTS, ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < batch; first += MAX_BATCH)
      product(w, begin, end, from + first * w.blocks * BLOCK, std::min(MAX_BATCH, batch - first), isa(),
              [&](int64_t t, int64_t row, float sum) {
                if (shift) sum += load<1>(shift + row, 1)[0];
                store<1>(to + (first + t) * w.rows + row, Vector<float, 1>{sum}, 1);
              });
  });
}

#ifdef GAUGEKIT_PAIRS
void fused_pairs(const Weight& w, const Tensor& x, const Optional& bias, int64_t batch, int64_t columns,
                 Tensor& out) {
  const BFloat16* shift = bias ? data<BFloat16>(*bias) : nullptr;
  BFloat16* to = static_cast<BFloat16*>(out.mutable_data_ptr());
  const auto give = [&](int64_t t, int64_t row, Vector<float, ROWS> sums, int64_t count) GAUGEKIT_PAIRS {
    if (shift) sums += load<ROWS>(shift + row, count);
    store<ROWS>(to + t * w.rows + row, sums, count);
  };
  constexpr int64_t whole = std::numeric_limits<int64_t>::max();
#ifdef GAUGEKIT_X86
  if (takes_outputs(batch, columns) && !Registers::usable()) {
    const Halves even = columns % 2 ? arrange_rows(data<uint16_t>(x), batch, columns) : nullptr;
    return over_pieces(w, columns, whole, GROUP, [&](int64_t begin, int64_t end) {
      product_of_outputs(w, begin, end, even ? even[0].at : data<uint16_t>(x), columns + columns % 2, batch,
                         give);
    });
  }
#endif
  const Halves arranged = arrange_pairs(data<BFloat16>(x), batch, columns, w.blocks);
#ifdef GAUGEKIT_X86
  if (batch > FEW && !w.e5m2() && Registers::usable()) {
    const std::vector<WordHalf> tiles = arrange_tiles(arranged[0].at, batch, w.blocks);
    return over_pieces(w, columns, whole, ROWS, [&](int64_t begin, int64_t end) {
      product_of_tiles(w, begin, end, tiles[0].at, batch, give);
    });
  }
#endif
  over_pieces(w, columns, whole, ROWS, [&](int64_t begin, int64_t end) {
    product_of_pairs(w, begin, end, arranged[0].at, batch, give);
  });
}
#endif

Tensor linear(const Tensor& x, const Tensor& raw, const Tensor& planes, const Tensor& escapes,
              const Tensor& offsets, const Tensor& window, const Optional& bias, bool fuse) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected [..., K]");
  const int64_t columns = x.size(x.dim() - 1);
  const Weight w = weight_of(raw, planes, escapes, offsets, window, columns);
  if (bias) {
    check_shape("bias", *bias, {w.rows});
    check_dtype("bias", *bias, x.scalar_type());
  }
  std::vector<int64_t> sizes;
  int64_t batch = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i)), batch *= x.size(i);
  sizes.push_back(w.rows);
  const Tensor dense = torch::stable::contiguous(x);
  const Tensor flat = torch::stable::view(dense, {batch, columns});
  const Optional shift = bias ? Optional(torch::stable::contiguous(*bias)) : std::nullopt;
  Tensor out = torch::stable::new_empty(x, {batch, w.rows});
  const ScalarType dtype = x.scalar_type();
  const bool suits =
      dtype == word_dtype(w) || dtype == ScalarType::Float || (w.e5m2() && dtype == ScalarType::BFloat16);
  if (out.numel() == 0) {
  } else if (!fuse || !suits) {
    Tiles(w, flat, shift, columns, out).run();
  } else if (dtype == ScalarType::Float) {
    fused<float>(w, flat, shift, batch, columns, out);
  } else if (dtype == ScalarType::Half) {
    fused<Float16>(w, flat, shift, batch, columns, out);
#ifdef GAUGEKIT_PAIRS
  } else if (isa() >= PAIRS_LEVEL && w.segments() > 0 && (!w.e5m2() || PAIRS_OF_E5M2)) {
    fused_pairs(w, flat, shift, batch, columns, out);
#endif
  } else {
    fused<BFloat16>(w, flat, shift, batch, columns, out);
  }
  return torch::stable::view(out, sizes);
}

}  // namespace
}  // namespace gaugekit::packed

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("packed_survey", TORCH_BOX(&gaugekit::packed::survey));
  m.impl("packed_encode", TORCH_BOX(&gaugekit::packed::encode));
  m.impl("packed_rows", TORCH_BOX(&gaugekit::packed::rows));
  m.impl("packed_linear", TORCH_BOX(&gaugekit::packed::linear));
}
