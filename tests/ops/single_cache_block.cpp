// Runs every block of the GPU's attention from one cache (csrc/common/single_cache_warp.h) on the processor
// and adds up what they leave, against the equation in double. Prints the cases that differ. Compiled and run
// by test_single_cache_attention_twin.py.
#include <algorithm>
#include <random>

#include "single_cache_machine.h"

namespace {

using namespace gaugekit::cache;

struct Shape {
  int batch, heads, groups, queries, keys, width;
  bool slices;
  const char* terms;
  int pairs = 0;
  bool causal = true;
  int window = 0;
  std::vector<int64_t> lengths = {}, starts = {};
  int page = 0;
  bool zero = false;  // queries of 0: the mean of what is seen
};

template <class X>
const X* data(const std::vector<X>& x) {
  return x.empty() ? nullptr : x.data();
}

template <bool HALF>
struct Case {
  using N = Numbers<HALF>;
  const Shape& s;
  int repeats, values, rows, splits, places;
  std::vector<uint32_t> q;
  std::vector<Quad> cache;  // rows 16 bytes apart from each other's ends
  std::vector<int32_t> table;
  std::vector<float> gain, alpha, beta, gamma, sums, means, tops, totals;
  std::vector<Quad> cos, sin;
  Call f{};

  int row_bytes() const { return 2 * s.width + 16; }
  float angle(const std::vector<Quad>& of, int j, int i) const {
    return reinterpret_cast<const float*>(of.data())[int64_t(j) * s.pairs + i];
  }
  uint16_t* row(int batch, int group, int j) {
    const int64_t block = s.page ? table[batch * f.pages + j / s.page] : batch,
                  place = s.page ? j % s.page : j;
    const int64_t each = s.page ? s.page : s.keys;
    return reinterpret_cast<uint16_t*>(reinterpret_cast<char*>(cache.data()) +
                                       ((block * s.groups + group) * each + place) * row_bytes());
  }
  double query(int batch, int head, int t, int i) const {
    const uint32_t word = q[(((int64_t(batch) * s.queries + t) * s.heads + head) * s.width + i) / 2];
    return N::unpack(word).of[i % 2];
  }

  Case(const Shape& s, std::mt19937& random) : s(s) {
    std::normal_distribution<float> normal;
    repeats = s.heads / s.groups, values = s.slices ? s.width / repeats : s.width, rows = repeats * s.queries;
    splits = (s.keys + kSplit - 1) / kSplit, places = s.batch * s.groups * splits;
    const auto fill = [&](std::vector<float>& x, int64_t count) {
      for (x.resize(count); count--;) x[count] = normal(random);
    };
    for (int i = 0; i < s.batch * s.queries * s.heads * s.width / 2; ++i)
      q.push_back(s.zero ? 0 : N::pack(normal(random), normal(random)));
    const int pages = s.page ? s.keys / s.page : 0;
    for (int i = 0; i < s.batch * pages; ++i) table.push_back(i);
    std::shuffle(table.begin(), table.end(), random);
    cache.assign(int64_t(s.batch) * s.groups * s.keys * row_bytes() / sizeof(Quad), Quad{});
    std::memset(cache.data(), 0xff, cache.size() * sizeof(Quad));
    for (const char* term = s.terms; *term; ++term)
      fill(*term == 'a' ? alpha : *term == 'b' ? beta : gamma, s.heads);
    if (s.pairs) {
      fill(gain, s.width);
      for (int i = 0; i < s.keys * s.pairs / 4; ++i) {
        Quad c, d;
        for (int k = 0; k < 4; ++k) {
          const float angle = normal(random);
          c.of[k] = std::cos(angle), d.of[k] = std::sin(angle);
        }
        cos.push_back(c), sin.push_back(d);
      }
    }
    describe();
    for (int b = 0; b < s.batch; ++b)  // what nobody sees stays no number
      for (int j = 0; j < s.keys; ++j)
        if (is_seen(b, j))
          for (int g = 0; g < s.groups; ++g)
            for (int i = 0; i < s.width; ++i) row(b, g, j)[i] = N::narrow(normal(random) + 0.25f);
    // Pages that no query sees may be named by anything.
    for (int b = 0; b < s.batch * (pages > 0); ++b)
      for (int p = 0; p < pages; ++p) {
        bool seen = false;
        for (int j = p * s.page; j < (p + 1) * s.page; ++j) seen = seen || is_seen(b, j);
        if (!seen) table[b * pages + p] = 1 << 30;
      }
  }

  void describe() {
    const auto places_of = [&](std::vector<float>& x, int64_t each) { x.assign(places * each, NAN); };
    places_of(sums, rows * values), places_of(means, s.queries * s.width);
    places_of(tops, rows), places_of(totals, rows);
    f.q = q.data();
    f.q_head = s.width / 2, f.q_query = s.heads * f.q_head, f.q_batch = s.queries * f.q_query;
    f.cache = reinterpret_cast<const char*>(cache.data());
    f.row_bytes = row_bytes(), f.group_bytes = (s.page ? s.page : s.keys) * f.row_bytes;
    f.batch_bytes = s.groups * f.group_bytes;
    f.table = data(table), f.pages = s.page ? s.keys / s.page : 0, f.page = s.page ? s.page : s.keys;
    f.start = data(s.starts), f.lengths = data(s.lengths);
    f.gain = data(gain), f.alpha = data(alpha), f.beta = data(beta), f.gamma = data(gamma);
    f.cos = reinterpret_cast<const float*>(data(cos)), f.sin = reinterpret_cast<const float*>(data(sin));
    f.sums = sums.data(), f.means = means.data(), f.tops = tops.data(), f.totals = totals.data();
    f.queries = s.queries, f.keys = s.keys, f.groups = s.groups, f.repeats = repeats, f.width = s.width;
    f.values = values, f.pairs = s.pairs, f.splits = splits, f.window = s.window, f.causal = s.causal;
    f.scale = 0.3f * kLog2E;
  }

  int64_t start(int b) const { return !s.starts.empty() ? s.starts[b] : s.causal ? s.keys - s.queries : 0; }
  int64_t length(int b) const { return s.lengths.empty() ? s.keys : s.lengths[b]; }
  bool sees(int b, int t, int64_t j) const {
    const int64_t p = start(b) + t;
    if (j >= length(b) || (s.causal && (j > p || p >= length(b)))) return false;
    return !s.window || (p - s.window < j && (s.causal || j < p + s.window));
  }
  bool is_seen(int b, int j) const {
    bool seen = false;
    for (int t = 0; t < s.queries; ++t) seen = seen || sees(b, t, j);
    return seen;
  }

  std::vector<double> key(const uint16_t* x, int j) const {
    std::vector<double> k(s.width);
    const int half = s.width / 2;
    for (int i = 0; i < s.width; ++i) k[i] = N::widen(x[i]) * (gain.empty() ? 1.0 : gain[i]);
    for (int i = 0; i < s.pairs; ++i) {
      const double a = k[i], b = k[half + i], c = angle(cos, j, i), d = angle(sin, j, i);
      k[i] = a * c - b * d, k[half + i] = b * c + a * d;
    }
    return k;
  }

  // Elements of one query row that lie further from the equation than roundings explain: weights, and keys
  // that were turned, are rounded to 16 bits.
  int differing(int b, int head, int t) {
    const int group = head / repeats, shift = s.slices ? head % repeats * values : 0;
    const double unit = HALF ? 0x1p-11 : 0x1p-8;
    std::vector<double> score, own(values), size(values), mean(values);
    std::vector<int> seen;
    double top = -INFINITY, total = 0, loose = 0;
    for (int j = 0; j < s.keys; ++j) {
      if (!sees(b, t, j)) continue;
      const std::vector<double> k = key(row(b, group, j), j);
      double sum = 0, sizes = 0;
      for (int i = 0; i < s.width; ++i)
        sum += query(b, head, t, i) * k[i], sizes += std::fabs(query(b, head, t, i) * k[i]);
      seen.push_back(j), score.push_back(0.3 * sum);
      top = std::max(top, score.back());
      loose = std::max(loose, 0.3 * sizes * (s.pairs ? unit : 0x1p-20));
    }
    for (double& x : score) total += x = std::exp(x - top);
    for (size_t n = 0; n < seen.size(); ++n)
      for (int c = 0; c < values; ++c) {
        const double v = N::widen(row(b, group, seen[n])[shift + c]);
        own[c] += score[n] / total * v, size[c] += score[n] / total * std::fabs(v),
            mean[c] += v / seen.size();
      }
    int wrong = 0;
    for (int c = 0; c < values; ++c) {
      double exact = own[c] * (beta.empty() ? 1 : beta[head]);
      const double bound =
          std::fabs(beta.empty() ? 1 : beta[head]) * size[c] * (s.zero ? 0x1p-18 : unit + 2 * loose) + 1e-5;
      if (!gamma.empty()) exact -= gamma[head] * mean[c];
      const int64_t p = start(b) + t;
      if (!alpha.empty() && 0 <= p && p < length(b))
        exact += alpha[head] * N::widen(row(b, group, p)[shift + c]);
      const float found = combined<N>(f, b * s.groups + group, head % repeats * s.queries + t, c);
      wrong += !(std::fabs(found - exact) <= bound);
    }
    return wrong;
  }
};

template <bool HALF, Form FORM, int STEPS>
int run_blocks(Case<HALF>& given, bool late) {
  int conflicts = 0;
  for (int pair = 0; pair < given.s.batch * given.s.groups; ++pair)
    for (int split = 0; split < given.splits; ++split) {
      Block block(Stage<STEPS>::place(kStages, given.s.pairs), late);
      block.run([&](int thread) {
        Machine<HALF> machine(block, thread);
        attend_split<FORM, STEPS>(machine, given.f, pair, split);
      });
      conflicts += block.conflicts;
    }
  return conflicts;
}

template <bool HALF>
int compare(const Shape& s, int index, std::mt19937& random, int& conflicts) {
  Case<HALF> given(s, random);
  const bool means = s.slices && !given.gamma.empty();
  int wrong = 0;
  std::vector<float> before;
  for (const bool late : {false, true}) {
    if (HALF && !late) continue;
    if (s.pairs)
      conflicts += run_blocks<HALF, Form::turned, 4>(given, late);
    else if (s.width <= 512)
      conflicts += means ? run_blocks<HALF, Form::means, 4>(given, late)
                         : run_blocks<HALF, Form::plain, 4>(given, late);
    else if (s.width <= 1024)
      conflicts += means ? run_blocks<HALF, Form::means, 8>(given, late)
                         : run_blocks<HALF, Form::plain, 8>(given, late);
    else
      conflicts += means ? run_blocks<HALF, Form::means, 16>(given, late)
                         : run_blocks<HALF, Form::plain, 16>(given, late);
    if (!before.empty() && std::memcmp(before.data(), given.sums.data(), before.size() * sizeof(float)))
      ++wrong;
    before = given.sums;
  }
  for (int b = 0; b < s.batch; ++b)
    for (int head = 0; head < s.heads; ++head)
      for (int t = 0; t < s.queries; ++t) wrong += given.differing(b, head, t);
  if (wrong) std::printf("wrong: %d, case %d, half %d\n", wrong, index, HALF);
  return s.batch * s.heads * s.queries * given.values;
}

}  // namespace

int main() {
  const std::vector<Shape> shapes = {
      {2, 4, 1, 1, 70, 64, true, "abg", 0, true, 0, {70, 33}, {69, 32}},
      {1, 3, 1, 1, 40, 96, false, ""},
      {2, 2, 1, 4, 50, 160, true, "abg", 0, true, 7, {50, 3}, {46, -1}},
      {1, 16, 1, 1, 37, 512, true, "g"},
      {1, 8, 2, 3, 21, 64, false, "abg", 0, true},
      {1, 2, 1, 2, 30, 64, false, "g", 0, false, 9, {25}},
      {1, 1, 1, 16, 40, 32, true, "a"},
      {2, 4, 1, 1, 530, 64, true, "bg", 0, true, 0, {530, 513}, {529, 512}},
      {1, 4, 2, 2, 600, 32, false, "g", 0, true, 200},
      {2, 4, 1, 1, 80, 64, true, "g", 0, true, 0, {61, 0}, {60, -1}, 10},
      {1, 4, 2, 2, 37, 64, false, "abg", 16, true, 0, {35}, {33}},
      {1, 8, 1, 1, 45, 512, false, "", 64},
      {2, 2, 2, 1, 48, 96, true, "a", 48, true, 20, {48, 17}, {47, 16}, 16},
      {1, 12, 1, 1, 35, 768, true, "ag"},
      {1, 12, 1, 1, 20, 768, false, "g"},
      {1, 16, 1, 1, 35, 2048, true, "abg"},
      {1, 16, 1, 1, 18, 2048, false, ""},
      {1, 5, 1, 3, 33, 1600, true, "g"},
      {1, 4, 1, 1, 530, 128, true, "bg", 0, true, 0, {}, {}, 0, true},
  };
  std::mt19937 random(0);
  int checked = 0, conflicts = 0, cases = 0;
  for (size_t i = 0; i < shapes.size(); ++i, cases += 2) {
    checked += compare<false>(shapes[i], int(i), random, conflicts);
    checked += compare<true>(shapes[i], int(i), random, conflicts);
  }
  std::printf("cases %d, checked %d, conflicts %d\n", cases, checked, conflicts);
}
