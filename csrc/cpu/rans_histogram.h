// How often each symbol occurs in a chunk.
#pragma once

#include <cstdint>
#include <utility>

#include "rans_encoder_avx2.h"
#include "rans_encoder_avx512.h"
#include "rans_histogram_vbmi2.h"

namespace gaugekit::rans {

// Block by block, of at most 4,096 symbols each. Counting is faster by vectors where nearly all symbols are
// of a few consecutive ones: exponents are. Where they are is found in a block that is counted one by one.
class Histogram {
 public:
  explicit Histogram(Isa path) : path_(path) {}

  void add(const uint8_t* symbols, uint64_t n) {
#ifdef GAUGEKIT_X86
    if (windows_ && n % (in_bits() ? vbmi2::kCounted : 64) == 0) {
      if (count(symbols, n) > n / 16) leave_windows();
      return;
    }
#endif
    uint64_t i = 0;  // four parts, so that runs of one symbol do not wait for their own stores
    for (; i + 8 <= n; i += 8) {
      const uint64_t eight = load<uint64_t>(symbols + i);
      for (int k = 0; k < 8; ++k) ++parts_[k % 4][eight >> (8 * k) & 255];
    }
    for (; i < n; ++i) ++parts_[0][symbols[i]];
    if (has_avx2(path_)) find_windows();
  }

  void total(uint32_t (&counts)[256]) {
    leave_windows();
    for (int s = 0; s < 256; ++s) counts[s] = parts_[0][s] + parts_[1][s] + parts_[2][s] + parts_[3][s];
  }

 private:
  static constexpr int kMostWindows = 4;

#ifdef GAUGEKIT_X86
  static_assert(kMostWindows * vbmi2::kBits <= 32, "lanes_ has a row for each symbol");
  bool in_bits() const { return has_vbmi2(path_); }

  uint64_t count(const uint8_t* symbols, uint64_t n) {
    if (in_bits()) return vbmi2::count_range(symbols, n, low_, windows_, parts_[0], lanes_);
    const auto count = path_ >= Isa::avx512 ? avx512::count_range : avx2::count_range;
    return count(symbols, n, low_, windows_, parts_[0]);
  }

  void find_windows() {
    uint32_t counts[256], up_to[257] = {};
    total(counts);
    for (int s = 0; s < 256; ++s) up_to[s + 1] = up_to[s] + counts[s];
    for (int windows = 1; windows <= kMostWindows && !windows_; ++windows) {
      const int size = windows * (in_bits() ? vbmi2::kBits : kWindow);
      low_ = 0;
      for (int s = 1; s <= 256 - size; ++s)
        if (up_to[s + size] - up_to[s] > up_to[low_ + size] - up_to[low_]) low_ = s;
      if (up_to[256] - (up_to[low_ + size] - up_to[low_]) <= up_to[256] / 32) windows_ = windows;
    }
    if (!windows_) path_ = Isa::portable;
  }
#else
  void find_windows() {}
#endif

  void leave_windows() {
#ifdef GAUGEKIT_X86
    for (int k = 0; in_bits() && k < windows_ * vbmi2::kBits; ++k)
      for (uint64_t& lane : lanes_[k]) parts_[0][low_ + k] += uint32_t(std::exchange(lane, 0));
#endif
    windows_ = 0;
  }

  Isa path_;
  int low_ = 0, windows_ = 0;
  uint32_t parts_[4][256] = {};
  alignas(64) uint64_t lanes_[32][8] = {};  // of the symbols from low_ on
};

}  // namespace gaugekit::rans
