// y = x Wᵀ for many rows x: W decoded by tiles for torch's matmul.
#pragma once

#include <algorithm>
#include <atomic>

#include "common/linear.h"
#include "packed_linear_decode.h"

#ifdef GAUGEKIT_X86
#include <cpuid.h>
#endif

namespace gaugekit::packed {

using torch::stable::parallel_for;

constexpr int64_t GRAIN_WEIGHTS = 1 << 16;  // that a thread takes at a time
constexpr int64_t TILE_WEIGHTS = 1 << 20;  // decoded for torch's matmul at a time: that needs enough rows, of
                                           // 14,336 weights, too, to be quick

inline int64_t grain_of_rows(int64_t columns, int64_t multiple = 1) {
  const int64_t rows = std::max<int64_t>(1, GRAIN_WEIGHTS / std::max<int64_t>(1, columns));
  return (rows + multiple - 1) / multiple * multiple;
}

// The 16-bit numbers that weights are decoded to.
inline ScalarType word_dtype(const Weight& w) { return w.half() ? ScalarType::Half : ScalarType::BFloat16; }

// Whether the processor multiplies this 16-bit format by itself; without that torch's matmul in float is
// several times as fast as its matmul in 16 bits.
inline bool multiplies(ScalarType dtype) {
#ifdef GAUGEKIT_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (dtype == ScalarType::Half)
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);  // AVX512-FP16
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);     // AVX512-BF16
#else
  return true;
#endif
}

// Some rows of W at a time are decoded and handed to torch's matmul, which gives those columns of the output.
// Tiles do not depend on the number of threads, so neither does any bit.
class Tiles {
 public:
  Tiles(const Weight& w, const Tensor& x, const Optional& bias, int64_t columns, Tensor& out)
      : w_(w), batch_(x.size(0)), columns_(columns), given_(x.scalar_type()), stored_(word_dtype(w)) {
    const bool wide = given_ == ScalarType::Float || given_ == ScalarType::Double;
    dtype_ = wide || multiplies(given_) ? given_ : ScalarType::Float;
    x_ = dtype_ == given_ ? x : torch::stable::to(x, dtype_);
    if (bias) bias_ = torch::stable::to(*bias, dtype_);
    out_ = static_cast<char*>(out.mutable_data_ptr());
    const int64_t row = std::max<int64_t>(1, columns);
    step_ = std::max<int64_t>(
        1, std::min(TILE_WEIGHTS / row, std::max(grain_of_rows(columns), (w.rows + 7) / 8)));
    tiles_ = (w.rows + step_ - 1) / step_;
    threads_ = std::min<int64_t>(tiles_, torch::stable::get_num_threads());
    decoded_ = torch::stable::new_empty(x, {threads_, step_ * row}, stored_);
    converted_ = torch::stable::new_empty(x, {dtype_ == stored_ ? 0 : threads_, step_ * row}, dtype_);
    products_ = torch::stable::new_empty(x, {dtype_ == given_ ? 0 : threads_, batch_ * step_}, dtype_);
  }

  // Threads take tile after tile and meet once, at the end: inside a parallel region of torch's its operators
  // run on the thread that calls them. Which tensors they read and write is settled before, since what torch
  // keeps by thread (autograd, autocast) is another there.
  void run() {
    std::atomic<int64_t> next{0}, place{0};
    parallel_for(0, threads_, 1, [&](int64_t, int64_t) {
      const int64_t thread = place++;
      for (int64_t tile; (tile = next++) < tiles_;) multiply(tile * step_, thread);
    });
  }

 private:
  static char* of_thread(Tensor& memory, int64_t thread) {
    return static_cast<char*>(memory.mutable_data_ptr()) + thread * memory.size(1) * memory.element_size();
  }

  // The output's columns from `first` on.
  void multiply(int64_t first, int64_t thread) {
    const int64_t count = std::min(step_, w_.rows - first);
    uint16_t* words = reinterpret_cast<uint16_t*>(of_thread(decoded_, thread));
    for (int64_t i = 0; i < count; ++i) decode_row(w_, first + i, columns_, words + i * columns_, isa());
    Tensor weight = matrix(words, stored_, count, columns_, columns_);
    if (dtype_ != stored_) {
      Tensor converted = matrix(of_thread(converted_, thread), dtype_, count, columns_, columns_);
      torch::stable::copy_(converted, weight);
      weight = converted;
    }
    const Tensor x = matrix(x_.const_data_ptr(), dtype_, batch_, columns_, columns_);
    Optional bias;
    if (bias_) {
      const char* from = static_cast<const char*>(bias_->const_data_ptr()) + first * bias_->element_size();
      bias = torch::stable::select(matrix(from, dtype_, 1, count, count), 0, 0);
    }
    const int64_t bytes = given_ == ScalarType::Double ? 8 : given_ == ScalarType::Float ? 4 : 2;
    Tensor out = matrix(out_ + first * bytes, given_, batch_, count, w_.rows);
    if (dtype_ == given_) return linear_into(out, x, weight, bias);
    const Tensor product = matrix(of_thread(products_, thread), dtype_, batch_, count, count);
    linear_into(product, x, weight, bias);
    torch::stable::copy_(out, product);
  }

  const Weight& w_;
  const int64_t batch_, columns_;
  const ScalarType given_, stored_;
  ScalarType dtype_;  // of the products
  int64_t step_, tiles_, threads_;
  Tensor x_, decoded_, converted_, products_;
  Optional bias_;
  char* out_;
};

}  // namespace gaugekit::packed
