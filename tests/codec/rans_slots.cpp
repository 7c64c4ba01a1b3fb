// The table that a GPU's threads make together (csrc/common/rans_slots.h), step by step for all of them,
// beside the one that one thread makes: every slot of random tables. Prints the cases that differ. Compiled
// and run by test_rans_slots.py.
#include "common/rans_slots.h"

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

namespace {

using namespace gaugekit::rans;

constexpr int kThreads = 64;

// `size` ascending symbols with frequencies that sum to 4096, most of them small where `steep`.
std::vector<uint8_t> random_table(int size, int model, bool steep, std::mt19937& random) {
  std::vector<int> frequency(size, 1);
  for (int left = int(kSlots) - size; left > 0;) {
    const int i = random() % size, most = steep ? left : 1 + left / 16;
    const int more = 1 + random() % most;
    frequency[steep ? i * i / size : i] += more;
    left -= more;
  }
  std::vector<uint8_t> pairs(4 * size);
  const int first = model == kExponentAndTwo ? 4 * (20 + int(random() % 40)) : 0;
  int symbol = model == kExponentAndTwo ? 0 : int(random() % (257 - size));
  for (int i = 0; i < size; ++i, ++symbol) {
    if (model == kExponentAndTwo && symbol == kZeroSymbols) symbol = first;
    const uint16_t pair[2] = {uint16_t(symbol), uint16_t(frequency[i])};
    std::memcpy(pairs.data() + 4 * i, pair, 4);
  }
  return pairs;
}

// The same for the threads in turn, a step at a time; false where a fault was found.
bool make_together(const std::vector<uint8_t>& pairs, int model, SlotMaker& m, SlotTable& table) {
  const int size = int(pairs.size() / 4);
  const auto each = [&](auto step) {
    bool bad = false;
    for (int thread = 0; thread < kThreads; ++thread) bad |= step(thread);
    return bad;
  };
  if (each([&](int t) { return read_slots(pairs.data(), size, model, t, kThreads, m, table); })) return false;
  if (each([&](int t) { return read_frequencies(pairs.data(), size, t, kThreads, m, table); })) return false;
  if (each([&](int t) { return order_buckets(t, kThreads, m); })) return false;
  each([&](int t) { return find_aliases(t, kThreads, m), false; });
  each([&](int t) { return make_words(t, kThreads, m), false; });
  each([&](int t) { return fill_slots(t, kThreads, m, table), false; });
  return true;
}

int differing(const std::vector<uint8_t>& pairs, int model) {
  const auto m = std::make_unique<SlotMaker>();
  const auto slots = std::make_unique<SlotTable>();
  const auto symbols = std::make_unique<Table>();
  const auto buckets = std::make_unique<Buckets>();
  const auto lanes = std::make_unique<LaneTable>();
  const bool sound = read_table(pairs.data(), int(pairs.size() / 4), model, *symbols) == nullptr;
  if (sound != make_together(pairs, model, *m, *slots)) return 1;
  if (!sound) return 0;
  make_buckets(*symbols, *buckets);
  fill_lanes(*symbols, *buckets, *lanes);
  int wrong = lanes->shift != slots->shift;
  for (uint32_t x = 0; x < 3 * kSlots; ++x) {
    const uint32_t state = x < kSlots ? x : x < 2 * kSlots ? kStateLower + x : kStateUpper - 1 - x;
    uint32_t symbol = 0, found = 0;
    const uint32_t a = lane_step(state, *lanes, symbol), b = slot_step(state, slots->slot, found);
    wrong += a != b || symbol != slot_symbol(found);
  }
  return wrong;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  int cases = 0, refused = 0;
  for (const int model : {int(kExponent), int(kExponentAndTwo)})
    for (const int size : {1, 2, 3, 17, 31, 32, 33, 64, 100, 128, 200, 255, 256})
      for (const bool steep : {false, true})
        for (int repeat = 0; repeat < 8; ++repeat, ++cases) {
          auto pairs = random_table(size, model, steep, random);
          if (const int wrong = differing(pairs, model))
            std::printf("differ: model %d, %d symbols, steep %d: %d\n", model, size, steep, wrong);
          pairs[random() % pairs.size()] ^= 1 << random() % 8;
          Table table;
          refused += read_table(pairs.data(), size, model, table) != nullptr;
          if (differing(pairs, model))
            std::printf("differ after damage: model %d, %d symbols\n", model, size);
        }
  std::printf("refused %d, cases %d\n", refused, cases);
}
