// The stack: 32 interleaved rANS coders (Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392) over one pile of
// 16-bit words. Free of torch.
//
// What is pushed last is popped first. Symbol i of a sequence belongs to coder i mod 32; a sequence is pushed
// from its last symbol to its first, and popped from its first to its last. States are in [2^16, 2^32). A
// stack that is empty gives the words of a fixed pseudo-random sequence, the seed: a decoder that has given
// everything back must find just those words again.
#pragma once

#include <cstdint>

namespace gaugekit::bitsback {

constexpr int kCoders = 32, kTableBits = 12;

// Word number i of the seed (SplitMix64, Steele et al. 2014, its highest 16 bits).
inline uint16_t seed_word(uint64_t i) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return uint16_t((x ^ (x >> 31)) >> 48);
}

inline uint32_t first_state(int coder) { return uint32_t(1) << 16 | seed_word(~uint64_t(coder) - 1); }

struct Stack {
  uint16_t* words;
  int64_t size, capacity, seeds;  // words there, room for, taken of the seed
  bool seeded;                    // whether it may give words of the seed: encoding
  bool failed = false;
  uint32_t states[kCoders];

  uint16_t beneath() {
    if (!seeded) failed = true;
    return seed_word(uint64_t(seeds++));
  }

  void put(uint32_t& x, bool full) {
    words[size] = uint16_t(x);
    size += full;
    x >>= full ? 16 : 0;
  }

  void refill(uint32_t& x) {
    if (x >= uint32_t(1) << 16) return;
    x = x << 16 | (size > 0 ? words[--size] : beneath());
  }

  // refill, where a word is there for sure.
  void refill_from_words(uint32_t& x) {
    const bool low = x < uint32_t(1) << 16;
    const uint32_t word = words[size - 1];
    x = low ? x << 16 | word : x;
    size -= low;
  }

  // Pops symbols 0 to count − 1: step(i, x) takes symbol i out of state x.
  template <class Step>
  void pop(int64_t count, const Step& step) {
    int64_t i = 0;
    while (i < count) {
      // In blocks for which words are there, whatever they need.
      const int64_t sure = i + (size < count - i ? size : count - i) / kCoders * kCoders;
      if (sure == i) break;
      for (; i < sure; i += kCoders)
        for (int c = 0; c < kCoders; ++c) {
          step(i + c, states[c]);
          refill_from_words(states[c]);
        }
    }
    for (; i < count; ++i) {
      step(i, states[i % kCoders]);
      refill(states[i % kCoders]);
    }
  }

  // Pushes symbols count − 1 to 0: step(i, x) makes room with put, then puts symbol i into x.
  template <class Step>
  void push(int64_t count, const Step& step) {
    for (int64_t i = count - 1; i >= 0; --i) step(i, states[i % kCoders]);
  }

  // --- integers below 2^bits, all alike; bits from 0 to 16 ---
  static uint32_t pop_uniform(uint32_t& x, int bits) {
    const uint32_t value = x & ((uint32_t(1) << bits) - 1);
    x >>= bits;
    return value;
  }
  void push_uniform(uint32_t& x, uint32_t value, int bits) {
    put(x, uint64_t(x) >> (32 - bits) != 0);
    x = x << bits | value;
  }

  // --- symbols of 4096 slots ---
  void push_slots(uint32_t& x, uint32_t start, uint32_t frequency) {
    put(x, uint64_t(x) >= uint64_t(frequency) << (32 - kTableBits));
    x = (x / frequency << kTableBits) + start + x % frequency;
  }
};

}  // namespace gaugekit::bitsback
