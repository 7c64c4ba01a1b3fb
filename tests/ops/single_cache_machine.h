// The machine of common/single_cache_warp.h on the processor: a block's threads as contexts that take turns,
// what a warp does together by the layouts that PTX's manual gives (ldmatrix, mma.m16n8k16, shfl), bulk
// copies and the barriers that count their bytes.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "common/packed_lane.h"
#include "common/single_cache_warp.h"

namespace gaugekit::cache {

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

template <bool HALF>
struct Numbers {
  static float widen(uint16_t bits) {
    return HALF ? packed::widen(packed::Float16Bits{bits}) : packed::widen(packed::BFloat16Bits{bits});
  }
  // To the nearest, ties to even: the largest number that is not above, or its neighbour. Bits of positive
  // numbers stand in the numbers' order.
  static uint16_t narrow(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    int low = 0, high = HALF ? 0x7c00 : 0x7f80;
    while (high - low > 1) (widen((low + high) / 2) <= size ? low : high) = (low + high) / 2;
    const double below = double(size) - widen(low), above = double(widen(high)) - size;
    return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
  }
  static Pair unpack(uint32_t word) { return {{widen(word & 0xffff), widen(word >> 16)}}; }
  static uint32_t pack(float low, float high) { return uint32_t(narrow(high)) << 16 | narrow(low); }
};

constexpr int kThreads = kWarps * kLanes;

// One block. With `late`, copies arrive when they are waited for, else at once: either must do.
struct Block {
  struct Arrival {
    int to, bytes;
    const void* from;
  };
  struct Together {  // threads that wait for each other
    int arrived = 0, turn = 0;
    void* given[kThreads];
  };
  bool late;
  std::vector<Quad> memory;
  std::vector<Arrival> coming[kStages];
  int expected[kStages] = {}, phases[kStages] = {}, running = -1, finished = 0, conflicts = 0;
  int64_t moves = 0;
  Together warps[kWarps], all;
  std::vector<ucontext_t> threads{kThreads};
  std::vector<std::unique_ptr<char[]>> stacks;
  ucontext_t scheduler;
  std::function<void(int)> body;

  Block(int bytes, bool late) : late(late), memory(bytes / sizeof(Quad) + 1) {
    std::memset(memory.data(), 0xff,
                memory.size() * sizeof(Quad));  // no number, to whoever reads it too early
  }
  char* shared() { return reinterpret_cast<char*>(memory.data()); }
  void pause() { swapcontext(&threads[running], &scheduler); }

  static void enter(unsigned low, unsigned high) {
    Block* block = reinterpret_cast<Block*>(uint64_t(high) << 32 | low);
    block->body(block->running);
    ++block->finished, ++block->moves;
    block->threads[block->running].uc_link = nullptr;
    for (;;) block->pause();
  }
  void run(std::function<void(int)> given) {
    body = std::move(given);
    const uint64_t self = reinterpret_cast<uint64_t>(this);
    for (int i = 0; i < kThreads; ++i) {
      stacks.push_back(std::make_unique<char[]>(1 << 16));
      getcontext(&threads[i]);
      threads[i].uc_stack.ss_sp = stacks[i].get(), threads[i].uc_stack.ss_size = 1 << 16;
      threads[i].uc_link = &scheduler;
      makecontext(&threads[i], reinterpret_cast<void (*)()>(&Block::enter), 2, unsigned(self),
                  unsigned(self >> 32));
    }
    for (int64_t before = -1; finished < kThreads;) {
      require(moves != before, "threads wait for ever");
      before = moves;
      for (int warp = 0; warp < kWarps; ++warp) run_warp(warp);
    }
    for (const auto& stage : coming) require(stage.empty(), "copies that nobody waits for");
  }

  // A warp goes as far ahead of the others as it can.
  void run_warp(int warp) {
    for (int64_t before = -1; moves != before;) {
      before = moves;
      for (int lane = 0; lane < kLanes; ++lane) {
        running = warp * kLanes + lane;
        if (threads[running].uc_link) swapcontext(&scheduler, &threads[running]);
      }
    }
  }

  // The last of `count` threads does for all of them what they came for, with what each has given.
  void meet(Together& group, int count, int index, void* given, const std::function<void(void**)>& act) {
    const int turn = group.turn;
    group.given[index] = given;
    if (++group.arrived < count) {
      while (group.turn == turn) pause();
      return;
    }
    act(group.given);
    group.arrived = 0, ++group.turn, ++moves;
  }

  void arrive(const Arrival& copy) { std::memcpy(shared() + copy.to, copy.from, copy.bytes); }
  void complete(int stage) {
    int bytes = 0;
    for (const Arrival& copy : coming[stage]) bytes += copy.bytes;
    if (!expected[stage] || bytes < expected[stage]) return;
    require(bytes == expected[stage], "more bytes than expected");
    if (late)
      for (const Arrival& copy : coming[stage]) arrive(copy);
    coming[stage].clear(), expected[stage] = 0, ++phases[stage];
  }
};

struct Matrices {
  int place;
  uint32_t* x;
};
struct Product {
  float* sum;
  uint32_t a[4], b[2];
};

template <bool HALF>
struct Machine : Numbers<HALF> {
  Block& block;
  char* shared;
  int lane, warp;

  Machine(Block& block, int thread)
      : block(block), shared(block.shared()), lane(thread % kLanes), warp(thread / kLanes) {}
  void together(void* given, const std::function<void(void**)>& act) {
    block.meet(block.warps[warp], kLanes, lane, given, act);
  }
  void sync() {
    block.meet(block.all, kThreads, warp * kLanes + lane, nullptr, [](void**) {});
  }
  void begin() { sync(); }
  bool elected() const { return lane == 0; }
  uint32_t fresh(uint32_t x) { return x; }
  float power(float x) { return exp2f(x); }
  float exchange(float x, int mask) {
    const float own = x;
    together(&x, [mask](void** given) {
      float all[kLanes];
      for (int i = 0; i < kLanes; ++i) all[i] = *static_cast<float*>(given[i]);
      for (int i = 0; i < kLanes; ++i) *static_cast<float*>(given[i]) = all[i ^ mask];
    });
    require(!std::isnan(own), "no number is exchanged");
    return x;
  }

  void expect(int stage, int bytes) {
    require(!block.expected[stage], "a stage is filled before it was waited for");
    block.expected[stage] = bytes;
  }
  void copy(int stage, int to, const void* from, int bytes) {
    require(to % 16 == 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
            "a bulk copy that is not of multiples of 16 bytes");
    require(0 <= to && to + bytes <= int(block.memory.size() * sizeof(Quad)), "a copy past shared memory");
    block.coming[stage].push_back({to, bytes, from});
    if (!block.late) block.arrive(block.coming[stage].back());
  }
  void wait(int stage, int phase) {
    for (block.complete(stage); block.phases[stage] % 2 == phase; block.complete(stage)) block.pause();
    ++block.moves;
  }

  void load(int place, uint32_t (&x)[4]) {
    fetch(place, x, [](char** row, int own, int matrix) {
      uint32_t word;
      std::memcpy(&word, row[8 * matrix + own / 4] + 4 * (own % 4), 4);
      return word;
    });
  }
  void load_transposed(int place, uint32_t (&x)[4]) {
    fetch(place, x, [](char** row, int own, int matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i)
        std::memcpy(&pair[i], row[8 * matrix + 2 * (own % 4) + i] + 2 * (own / 4), 2);
      return uint32_t(pair[1]) << 16 | pair[0];
    });
  }
  template <class Word>
  void fetch(int place, uint32_t (&x)[4], Word word) {
    Matrices given{place, x};
    together(&given, [&](void** all) {
      char* row[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int at = static_cast<Matrices*>(all[i])->place;
        require(at % 16 == 0, "a matrix's row at no multiple of 16 bytes");
        row[i] = shared + at;
      }
      for (int matrix = 0; matrix < 4; ++matrix) {
        int banks = 0;
        for (int i = 0; i < 8; ++i) banks |= 1 << (row[8 * matrix + i] - shared) / 16 % 8;
        block.conflicts += banks != 0xff;
        for (int i = 0; i < kLanes; ++i) static_cast<Matrices*>(all[i])->x[matrix] = word(row, i, matrix);
      }
    });
  }

  void multiply_add(float* sum, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product given{sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    together(&given, [](void** all) {
      float left[16][16], right[16][8];
      for (int i = 0; i < kLanes; ++i) {
        const Product& own = *static_cast<Product*>(all[i]);
        for (int word = 0; word < 4; ++word) {
          const Pair x = Numbers<HALF>::unpack(own.a[word]);
          for (int k = 0; k < 2; ++k) left[i / 4 + word % 2 * 8][i % 4 * 2 + word / 2 * 8 + k] = x.of[k];
        }
        for (int word = 0; word < 2; ++word) {
          const Pair x = Numbers<HALF>::unpack(own.b[word]);
          for (int k = 0; k < 2; ++k) right[i % 4 * 2 + word * 8 + k][i / 4] = x.of[k];
        }
      }
      for (int i = 0; i < kLanes; ++i)
        for (int c = 0; c < 4; ++c) {
          double total = static_cast<Product*>(all[i])->sum[c];
          for (int k = 0; k < 16; ++k)
            total += double(left[i / 4 + c / 2 * 8][k]) * right[k][i % 4 * 2 + c % 2];
          static_cast<Product*>(all[i])->sum[c] = static_cast<float>(total);
        }
    });
  }
};

}  // namespace gaugekit::cache
