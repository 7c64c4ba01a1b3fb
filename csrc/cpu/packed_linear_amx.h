// y = x Wᵀ in bfloat16 for more than FEW rows of x on processors with tile registers (AMX-BF16): TILE_ROWS
// rows of W are decoded into the second-level cache as packed_linear_pairs.h does, and multiplied by squares
// of two by two tiles of 16 × 16 sums. Free of torch.
//
// The order of summation is fixed and the same for every batch of more than FEW rows, and other than that of
// fewer: each sum takes its half blocks one after the other, block by block, both halves of a block in turn;
// within 32 words as tdpbf16ps does it.
//
// Not run on such a processor yet: the tests emulate the registers (`Registers` below is their only use).
#pragma once

#include "packed_linear_pairs.h"

#ifdef GAUGEKIT_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gaugekit::packed {

#ifdef GAUGEKIT_X86
constexpr int64_t SIDE = 16;             // rows of a tile, and floats or pairs of words in each
constexpr int64_t TILE_ROWS = 2 * SIDE;  // of W, decoded together
constexpr int64_t TILE_WORDS = SIDE * HALF_BLOCK;
constexpr int64_t TILE_PART_BLOCKS = 8;          // whose TILE_ROWS rows stay in the first-level cache
constexpr int64_t TILE_SUMS = TILE_ROWS * SIDE;  // of TILE_ROWS rows of W and SIDE rows of x

// The eight tile registers, 16 rows of 64 bytes each, from construction to destruction; what the thread had
// configured before is configured again afterwards.
class Registers {
 public:
  // Whether there are any, and the kernel lets this process use them, for which it has to be asked.
  static bool usable() {
#ifndef SYS_arch_prctl
    return false;  // not Linux
#else
    static const bool granted = [] {
      unsigned a = 0, b = 0, c = 0, d = 0;
      constexpr unsigned tiles = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
      if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles) return false;
      constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
      return syscall(SYS_arch_prctl, request, tile_data) == 0;
    }();
    return granted;
#endif
  }

  Registers() {
    Configuration ours;
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) ours.row_bytes[i] = 64, ours.rows[i] = SIDE;
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(ours));
  }
  ~Registers() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" : : "m"(before_));
    else
      asm volatile("tilerelease" : :);
  }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

  template <int N>
  GAUGEKIT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(N));
  }
  template <int N>
  GAUGEKIT_INLINE void load(const void* from, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride_bytes), "i"(N) : "memory");
  }
  template <int N>
  GAUGEKIT_INLINE void store(void* to, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride_bytes), "i"(N) : "memory");
  }
  // Tile C += tile A times tile B, whose row k holds pair k of each of its 16 columns.
  template <int C, int A, int B>
  GAUGEKIT_INLINE void add_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Configuration before_;
};

// Tiles of x for tile B, zero beyond its rows: [groups of SIDE rows][blocks][2][16 pairs][SIDE][2], from x as
// arrange_pairs leaves it.
inline std::vector<WordHalf> arrange_tiles(const uint16_t* x, int64_t batch, int64_t blocks) {
  const int64_t groups = (batch + SIDE - 1) / SIDE;
  std::vector<WordHalf> arranged(groups * blocks * 2 * SIDE);
  uint16_t* to = arranged[0].at;
  for (int64_t t = 0; t < batch; ++t)
    for (int64_t b = 0; b < blocks; ++b)
      for (int h = 0; h < 2; ++h) {
        const uint16_t* from = x + t * row_stride(blocks) + b * BLOCK + h * HALF_BLOCK;
        uint16_t* tile = to + ((t / SIDE * blocks + b) * 2 + h) * TILE_WORDS + t % SIDE * 2;
        for (int64_t pair = 0; pair < SIDE; ++pair)
          std::memcpy(tile + pair * HALF_BLOCK, from + 2 * pair, 2 * sizeof(uint16_t));
      }
  return arranged;
}

// The sums of TILE_ROWS decoded rows and GROUPS (1 or 2) groups of x, `blocks` blocks further; FIRST begins
// them. Groups of x are x_stride words apart, those of sums TILE_SUMS. Tiles 0 to 3 hold sums, 4 and 5 W, 6
// and 7 x.
template <class Tiles, int GROUPS, bool FIRST>
void multiply_square(Tiles& tiles, const uint16_t* words, int64_t row_words, const uint16_t* x,
                     int64_t x_stride, int64_t blocks, float* sums) {
  constexpr int64_t SUM_BYTES = SIDE * sizeof(float);
  float *const lower = sums + SIDE * SIDE, *const next = sums + TILE_SUMS, *const last = next + SIDE * SIDE;
  if (FIRST) {
    tiles.template zero<0>(), tiles.template zero<1>();
    if (GROUPS == 2) tiles.template zero<2>(), tiles.template zero<3>();
  } else {
    tiles.template load<0>(sums, SUM_BYTES), tiles.template load<1>(lower, SUM_BYTES);
    if (GROUPS == 2) tiles.template load<2>(next, SUM_BYTES), tiles.template load<3>(last, SUM_BYTES);
  }
  const int64_t row_bytes = row_words * sizeof(uint16_t), x_bytes = HALF_BLOCK * sizeof(uint16_t);
  for (int64_t b = 0; b < blocks; ++b)
    for (int h = 0; h < 2; ++h, x += TILE_WORDS) {
      const uint16_t* from = words + b * BLOCK + h * HALF_BLOCK;
      tiles.template load<6>(x, x_bytes);
      tiles.template load<4>(from, row_bytes);
      tiles.template add_products<0, 4, 6>();
      tiles.template load<5>(from + SIDE * row_words, row_bytes);
      tiles.template add_products<1, 5, 6>();
      if (GROUPS == 2) {
        tiles.template load<7>(x + x_stride, x_bytes);
        tiles.template add_products<2, 4, 7>();
        tiles.template add_products<3, 5, 7>();
      }
    }
  tiles.template store<0>(sums, SUM_BYTES), tiles.template store<1>(lower, SUM_BYTES);
  if (GROUPS == 2) tiles.template store<2>(next, SUM_BYTES), tiles.template store<3>(last, SUM_BYTES);
}

// The sums [groups][TILE_ROWS][SIDE] of TILE_ROWS decoded rows and all of x, part by part of their columns.
template <class Tiles>
void multiply_tiles(Tiles& tiles, const uint16_t* words, const uint16_t* x, int64_t groups, int64_t blocks,
                    float* sums) {
  const int64_t x_stride = blocks * 2 * TILE_WORDS;
  for (int64_t b = 0; b < blocks; b += TILE_PART_BLOCKS) {
    const int64_t count = std::min(TILE_PART_BLOCKS, blocks - b);
    for (int64_t g = 0; g < groups; g += 2) {
      const bool single = g + 1 == groups;
      const auto square =
          b == 0 ? (single ? multiply_square<Tiles, 1, true> : multiply_square<Tiles, 2, true>)
                 : (single ? multiply_square<Tiles, 1, false> : multiply_square<Tiles, 2, false>);
      square(tiles, words + b * BLOCK, row_stride(blocks), x + g * x_stride + b * 2 * TILE_WORDS, x_stride,
             count, sums + g * TILE_SUMS);
    }
  }
}

template <class Tiles, int C, bool PLAIN, class Give>
GAUGEKIT_BF16 void tiles_of(const Weight& w, int64_t begin, int64_t end, const uint16_t* x, int64_t batch,
                            const Give& give) {
  const int64_t stride = row_stride(w.blocks), groups = (batch + SIDE - 1) / SIDE;
  std::vector<WordHalf> decoded(TILE_ROWS * stride / HALF_BLOCK);
  std::vector<FloatBlock> sums(groups * TILE_SUMS / BLOCK);
  Tiles tiles;
  for (int64_t first = begin; first < end; first += TILE_ROWS) {
    const int64_t rows = std::min(TILE_ROWS, end - first);  // others are left of those before, or zero
    for (int64_t r = 0; r < rows; ++r) decode_pairs<C, PLAIN>(w, first + r, decoded[0].at + r * stride);
    multiply_tiles(tiles, decoded[0].at, x, groups, w.blocks, sums[0].at);
    for (int64_t r = 0; r < rows; r += ROWS)
      for (int64_t t = 0; t < batch; ++t) {
        const float* from = sums[0].at + (t / SIDE * TILE_ROWS + r) * SIDE + t % SIDE;
        Vector<float, ROWS> column;
        for (int i = 0; i < ROWS; ++i) column[i] = from[i * SIDE];
        give(t, first + r, column, std::min<int64_t>(ROWS, rows - r));
      }
  }
}

// As product_of_pairs, x being arranged by arrange_tiles.
template <class Tiles = Registers, bool PLAIN = false, class Give>
void product_of_tiles(const Weight& w, int64_t begin, int64_t end, const uint16_t* x, int64_t batch,
                      const Give& give) {
  return w.code_bits() == 3 ? tiles_of<Tiles, 3, PLAIN>(w, begin, end, x, batch, give)
                            : tiles_of<Tiles, 4, PLAIN>(w, begin, end, x, batch, give);
}
#endif

}  // namespace gaugekit::packed
