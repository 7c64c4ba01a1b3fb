// The vector work of single_cache_attention_pairs.h beside scalar models of it, bit for bit: scores, weighted
// sums, keys turned by their position. Prints a line for each case that differs, and how many cases there
// were. Compiled and run by test_single_cache_attention_twin.py.
#include "cpu/single_cache_attention_pairs.h"

#include "pair_models.h"

using namespace gaugekit;

namespace {

#ifdef GAUGEKIT_X86
Words pair_of(BFloat16 even, BFloat16 odd) { return even.bits | Words(odd.bits) << 16; }

// Rows with a number behind each that no sum may take up.
struct Block {
  int64_t step;
  std::vector<BFloat16> numbers_;
  std::vector<const BFloat16*> rows;
  Block(int64_t count, int64_t columns, std::mt19937& random)
      : step(columns + 1), numbers_(numbers(EDGE * step, random)), rows(EDGE) {
    for (int64_t j = 0; j < EDGE; ++j) {
      rows[j] = numbers_.data() + std::min(j, count - 1) * step;
      numbers_[j * step + columns] = {0x7fc0};  // NaN
    }
  }
};

// A score's lanes, then their sum: halves are added until one is left.
float score_of(const Words* q, const BFloat16* key, int64_t channels) {
  float lanes[LANES] = {};
  for (int64_t c = 0; c < channels; c += 2)
    lanes[c / 2 % LANES] = pair_added(lanes[c / 2 % LANES], q[c / 2],
                                      pair_of(key[c], c + 1 < channels ? key[c + 1] : BFloat16{0}));
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

void compare_scores(int64_t queries, int64_t count, int64_t channels, std::mt19937& random) {
  const Block keys(count, channels, random);
  const std::vector<BFloat16> from = numbers(queries * channels, random);
  const int64_t stride = padded<Words>(pairs_of(channels));
  Buffer<Words> q(queries * stride);
  Buffer<float> scores(queries * EDGE);
  pair_columns({from.data(), channels, queries, channels}, q.data(), stride);
  std::vector<const char*> next(EDGE, reinterpret_cast<const char*>(from.data()));
  score_pairs({q.data(), stride, queries, channels, keys.rows.data(), count, scores.data(), next.data()});
  bool same = true;
  for (int64_t r = 0; r < queries; ++r)
    for (int64_t j = 0; j < count; ++j)
      same &= bits_as<uint32_t>(scores[r * EDGE + j]) ==
              bits_as<uint32_t>(score_of(q.data() + r * stride, keys.rows[j], channels));
  check(same, "scores", queries, channels);
}

void compare_sums(int64_t rows, int64_t column, int64_t width, std::mt19937& random) {
  constexpr int64_t COUNT = 37;  // odd: the last pair's second row has no weight
  const Block values(COUNT, column + width, random);
  const std::vector<BFloat16> weights = numbers(rows * EDGE, random);
  std::vector<Words> p(rows * PAIRS);
  for (int64_t i = 0; i < rows * PAIRS; ++i) {
    const int64_t j = i % PAIRS * 2;
    p[i] = pair_of(weights[2 * i], j + 1 < COUNT ? weights[2 * i + 1] : BFloat16{0});
  }
  std::vector<float> to(rows * width);
  for (float& x : to) x = std::normal_distribution<float>()(random);
  const std::vector<float> before = to;
  std::vector<PairSum> sums;
  for (int64_t r = 0; r < rows; ++r)
    sums.push_back({p.data() + r * PAIRS, std::normal_distribution<float>()(random), to.data() + r * width});
  add_weighted_pairs({sums.data(), rows, values.rows.data(), column, width, (COUNT + 1) / 2});
  bool same = true;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) {
      float sum = sums[r].keep * before[r * width + c];
      for (int64_t i = 0; i < (COUNT + 1) / 2; ++i)
        sum = pair_added(sum, sums[r].p[i],
                         pair_of(values.rows[2 * i][column + c], values.rows[2 * i + 1][column + c]));
      same &= bits_as<uint32_t>(sum) == bits_as<uint32_t>(to[r * width + c]);
    }
  check(same, "sums", rows, width);
}

// To bfloat16, to the nearest even, subnormal numbers to zero: vcvtneps2bf16.
uint16_t rounded(float x) {
  const uint32_t bits = bits_as<uint32_t>(flushed(x));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void compare_turns(int64_t half, int64_t pairs, bool gained, std::mt19937& random) {
  const std::vector<BFloat16> v = numbers(2 * half, random);
  std::vector<BFloat16> key(2 * half + 1, BFloat16{7});
  std::vector<float> gain(2 * half), cos(pairs), sin(pairs);
  for (std::vector<float>* table : {&gain, &cos, &sin})
    for (float& x : *table) x = std::normal_distribution<float>()(random);
  turn_key({v.data(), key.data(), half, pairs, gained ? gain.data() : nullptr, cos.data(), sin.data()});
  bool same = key[2 * half].bits == 7;
  for (int64_t i = 0; i < half; ++i) {
    const auto at = [&](int64_t c) { return bits_as<float>(v[c].bits << 16) * (gained ? gain[c] : 1); };
    float x = at(i), y = at(half + i);
    if (i < pairs) {
      const float turned = std::fma(x, cos[i], -(y * sin[i]));
      y = std::fma(y, cos[i], x * sin[i]), x = turned;
    }
    same &= key[i].bits == rounded(x) && key[half + i].bits == rounded(y);
  }
  check(same, "turns", half, pairs);
}
#endif

}  // namespace

int main() {
#ifdef GAUGEKIT_X86
  std::mt19937 random(0);
  if (isa() >= Isa::bf16) {
    for (const int64_t queries : {1, 2, 3, 4, 5, 12, 17})
      for (const int64_t count : {1, 9, 48})
        for (const int64_t channels : {1, 3, 32, 33, 64, 100})
          compare_scores(queries, count, channels, random);
    for (const int64_t rows : {1, 2, 3, 4, 7, 12, 13, 31})
      for (const int64_t column : {0, 5})
        for (const int64_t width : {1, 3, 16, 17, 32, 33, 64, 96, 200})
          compare_sums(rows, column, width, random);
    for (const int64_t half : {1, 7, 16, 17, 40})
      for (const bool gained : {false, true})
        for (const int64_t pairs : {half, half / 2}) compare_turns(half, pairs, gained, random);
  }
  std::printf("levels %d, cases %d\n", static_cast<int>(isa()) + 1, cases);
#else
  std::printf("levels 1, cases 0\n");
#endif
}
