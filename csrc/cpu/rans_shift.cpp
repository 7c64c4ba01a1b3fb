// gaugekit::shift_rows on the CPU: to a channel of every row the same integer is added.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "common/isa.h"
#include "common/turns.h"

namespace gaugekit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytes = 1 << 18;     // of the rows that a thread takes at a time
constexpr double kNsOfByte = 1.0 / 48;  // about: good enough to tell when a thread is worth calling

// Unsigned numbers wrap around.
template <class T>
GAUGEKIT_INLINE void shift_row(const T* from, const T* shifts, T* to, int64_t channels) {
  typedef T Lanes __attribute__((vector_size(32)));
  constexpr int64_t lanes = sizeof(Lanes) / sizeof(T);
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    Lanes x, y;
    std::memcpy(&x, from + c, sizeof x);
    std::memcpy(&y, shifts + c, sizeof y);
    x += y;
    std::memcpy(to + c, &x, sizeof x);
  }
  for (; c < channels; ++c) to[c] = T(from[c] + shifts[c]);
}

template <class T>
GAUGEKIT_INLINE void shift_rows(const T* from, const T* shifts, T* to, int64_t rows, int64_t channels) {
  for (; rows; --rows, from += channels, to += channels) shift_row(from, shifts, to, channels);
}

template <class T>
using Shift = void (*)(const T*, const T*, T*, int64_t, int64_t);

template <class T>
void shift_portable(const T* from, const T* shifts, T* to, int64_t rows, int64_t channels) {
  shift_rows(from, shifts, to, rows, channels);
}

#ifdef GAUGEKIT_X86
template <class T>
GAUGEKIT_AVX2 void shift_avx2(const T* from, const T* shifts, T* to, int64_t rows, int64_t channels) {
  shift_rows(from, shifts, to, rows, channels);
}
#endif

template <class T>
Shift<T> chosen() {
#ifdef GAUGEKIT_X86
  if (isa() >= Isa::avx2) return shift_avx2<T>;
#endif
  return shift_portable<T>;
}

template <class T>
void shift_parts(const Tensor& data, const Tensor& shifts, const Tensor& out) {
  const int64_t parts = data.size(0), rows = data.size(1), channels = data.size(2);
  if (data.numel() == 0) return;
  const T* from = static_cast<const T*>(data.const_data_ptr());
  const T* by = static_cast<const T*>(shifts.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const Shift<T> shift_rows = chosen<T>();
  const int64_t row_bytes = channels * int64_t(sizeof(T));
  const int64_t step = std::max<int64_t>(1, kBytes / row_bytes);
  take_ranges(parts * rows, step, torch::stable::get_num_threads(), kNsOfByte * step * row_bytes,
              [&](int64_t begin, int64_t end) {
                for (int64_t next; begin < end; begin = next) {
                  const int64_t part = begin / rows;
                  next = std::min(end, (part + 1) * rows);
                  shift_rows(from + begin * channels, by + part * channels, to + begin * channels,
                             next - begin, channels);
                }
              });
}

void shift(const Tensor& data, const Tensor& shifts, Tensor out) {
  for (const Tensor* x : {&data, &shifts, static_cast<const Tensor*>(&out)})
    STD_TORCH_CHECK(x->is_contiguous() && x->scalar_type() == data.scalar_type(),
                    "data, shifts, out: expected contiguous integers of one dtype");
  STD_TORCH_CHECK(data.dim() == 3 && out.dim() == 3 && shifts.dim() == 2, "data: expected [N, S, C]");
  for (int i = 0; i < 3; ++i) STD_TORCH_CHECK(out.size(i) == data.size(i), "out: expected data's shape");
  STD_TORCH_CHECK(shifts.size(0) == data.size(0) && shifts.size(1) == data.size(2),
                  "shifts: expected [N, C]");
  switch (data.scalar_type()) {
    case ScalarType::Char:
      return shift_parts<uint8_t>(data, shifts, out);
    case ScalarType::Short:
      return shift_parts<uint16_t>(data, shifts, out);
    case ScalarType::Int:
      return shift_parts<uint32_t>(data, shifts, out);
    default:
      STD_TORCH_CHECK(false, "data: expected int8, int16 or int32");
  }
}

}  // namespace
}  // namespace gaugekit

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) { m.impl("shift_rows", TORCH_BOX(&gaugekit::shift)); }
