// The bitwise choice that host and device share. Free of torch.
#pragma once

#include <cstdint>

#include "common/lane.h"

namespace gaugekit {

// a where the mask is set, else b: one instruction, of which the compiler left to itself makes two.
GAUGEKIT_HD inline uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(bits) : "r"(a), "r"(b), "r"(mask));
  return bits;
#else
  return (a & mask) | (b & ~mask);
#endif
}

}  // namespace gaugekit
