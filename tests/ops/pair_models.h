// What the programs share that hold products of bfloat16 pairs against scalar models: the instruction's
// arithmetic, numbers to try, and the count of what was compared.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>

#include "cpu/ragged_attention_pairs.h"

#ifdef GAUGEKIT_X86
using namespace gaugekit;

namespace {

int cases = 0;

void check(bool same, const char* name, int64_t rows, int64_t columns) {
  ++cases;
  if (!same) std::printf("differ: %s, %dx%d\n", name, static_cast<int>(rows), static_cast<int>(columns));
}

// vdpbf16ps takes subnormal numbers for zeros, before and after, and adds the odd product first.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
float half_of(Words pair, int odd) { return flushed(bits_as<float>(odd ? pair & 0xffff0000u : pair << 16)); }
float pair_added(float sum, Words a, Words b) {
  for (int odd = 1; odd >= 0; --odd) sum = flushed(std::fma(half_of(a, odd), half_of(b, odd), flushed(sum)));
  return sum;
}

// Numbers of many sizes, subnormal ones among them.
std::vector<BFloat16> numbers(int64_t count, std::mt19937& random) {
  std::vector<BFloat16> x(count);
  for (BFloat16& one : x) {
    const float value = std::ldexp(std::normal_distribution<float>()(random), random() % 40 ? 0 : -130);
    one = {static_cast<uint16_t>(bits_as<uint32_t>(value) >> 16)};
  }
  return x;
}

}  // namespace
#endif
