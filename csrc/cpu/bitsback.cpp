// gaugekit::bitsback_* on the CPU: the stack in tensors of the caller, and the rotations on it.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bitsback_rotation.h"
#include "common/check.h"

namespace gaugekit::bitsback {
namespace {

constexpr int64_t kHead = 3;  // of the counters: words, words taken of the seed, whether it may be

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
}

void check_vector(const char* name, const Tensor& x, ScalarType dtype, int64_t size) {
  check_dtype(name, x, dtype);
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() == 1 && (size < 0 || x.size(0) == size), name,
                  ": expected a contiguous vector of another size");
}

// The stack of a caller for the length of a call. `most` is how many words it may grow by.
class Open {
 public:
  Open(const Tensor& words, const Tensor& counters, int64_t most) : counters_(counters) {
    check_vector("words", words, ScalarType::Short, -1);
    check_vector("counters", counters, ScalarType::Long, kHead + kCoders);
    const int64_t* from = data_of<int64_t>(counters);
    stack.words = data_of<uint16_t>(words);
    stack.capacity = words.numel();
    stack.size = from[0], stack.seeds = from[1], stack.seeded = from[2] != 0;
    STD_TORCH_CHECK(0 <= stack.size && stack.size + most <= stack.capacity && stack.seeds >= 0,
                    "words: expected room for what is pushed");
    for (int i = 0; i < kCoders; ++i) {
      const int64_t state = from[kHead + i];
      STD_TORCH_CHECK(state >> 16 > 0 && state >> 32 == 0, "counters: a state is not in [2^16, 2^32)");
      stack.states[i] = uint32_t(state);
    }
  }

  void close() {
    STD_TORCH_CHECK(!stack.failed, "corrupt stack: it ends too early");
    int64_t* to = data_of<int64_t>(counters_);
    to[0] = stack.size, to[1] = stack.seeds;
    for (int i = 0; i < kCoders; ++i) to[kHead + i] = stack.states[i];
  }

  Stack stack;

 private:
  const Tensor& counters_;
};

void check_bits(int64_t bits) { STD_TORCH_CHECK(1 <= bits && bits <= kMaxBits, "bits: expected 1 to 16"); }

void push_uniform(Tensor words, Tensor counters, const Tensor& values, int64_t bits) {
  check_bits(bits);
  check_vector("values", values, ScalarType::Int, -1);
  Open open(words, counters, values.numel());
  Stack stack = open.stack;
  const int32_t* from = data_of<int32_t>(values);
  const uint32_t mask = (1u << bits) - 1;
  stack.push(values.numel(),
             [&](int64_t i, uint32_t& x) { stack.push_uniform(x, uint32_t(from[i]) & mask, int(bits)); });
  open.stack = stack;
  open.close();
}

void pop_uniform(Tensor words, Tensor counters, Tensor out, int64_t bits) {
  check_bits(bits);
  check_vector("out", out, ScalarType::Int, -1);
  Open open(words, counters, 0);
  Stack stack = open.stack;
  int32_t* to = data_of<int32_t>(out);
  stack.pop(out.numel(), [&](int64_t i, uint32_t& x) { to[i] = int32_t(Stack::pop_uniform(x, int(bits))); });
  open.stack = stack;
  open.close();
}

// Symbols of a table: frequencies of 4096.
struct Table {
  std::vector<uint32_t> start, frequency;
  std::vector<uint16_t> symbol;

  explicit Table(const Tensor& frequencies) : symbol(kSlots) {
    check_vector("frequencies", frequencies, ScalarType::Int, -1);
    const int32_t* from = data_of<int32_t>(frequencies);
    int64_t sum = 0;
    for (int64_t s = 0; s < frequencies.numel(); ++s) {
      STD_TORCH_CHECK(from[s] >= 0 && sum + from[s] <= kSlots && s < 65536,
                      "corrupt stack: frequencies do not sum to 4096");
      start.push_back(uint32_t(sum)), frequency.push_back(uint32_t(from[s]));
      for (int32_t i = 0; i < from[s]; ++i) symbol[sum++] = uint16_t(s);
    }
    STD_TORCH_CHECK(sum == kSlots, "corrupt stack: frequencies do not sum to 4096");
  }
};

// How an element is coded: which bits are its symbol, the others being stored as they are.
struct Kind {
  int width, shift;  // bytes; bits below the symbol, the sign apart

  explicit Kind(int64_t kind) : width(kind == 0 ? 1 : 2), shift(kind == 0 ? 0 : kind == 1 ? 10 : 7) {
    STD_TORCH_CHECK(0 <= kind && kind <= 2, "kind: expected 0 (bytes), 1 (float16) or 2 (bfloat16)");
  }
  int plain() const { return width == 1 ? 0 : shift + 1; }
  int64_t alphabet() const { return width == 1 ? 256 : int64_t(1) << (15 - shift); }
};

template <int shift>
struct Halves {
  uint16_t* data;
  uint32_t symbol(int64_t i) const { return data[i] >> shift & ((1u << (15 - shift)) - 1); }
  uint32_t plain(int64_t i) const {
    return (data[i] & ((1u << shift) - 1)) | uint32_t(data[i] >> 15) << shift;
  }
  void set_symbol(int64_t i, uint32_t s) const { data[i] = uint16_t(s << shift); }
  void set_plain(int64_t i, uint32_t v) const {
    data[i] = uint16_t(data[i] | (v & ((1u << shift) - 1)) | (v >> shift) << 15);
  }
};

struct Bytes {
  uint8_t* data;
  uint32_t symbol(int64_t i) const { return data[i]; }
  uint32_t plain(int64_t) const { return 0; }
  void set_symbol(int64_t i, uint32_t s) const { data[i] = uint8_t(s); }
  void set_plain(int64_t, uint32_t) const {}
};

// body(elements, count) for the kind of the bytes in `data`.
template <class Body>
void with_elements(const Kind& kind, const Tensor& data, const Body& body) {
  check_vector("data", data, ScalarType::Byte, -1);
  STD_TORCH_CHECK(data.numel() % kind.width == 0, "data: expected whole elements");
  const int64_t count = data.numel() / kind.width;
  uint8_t* bytes = data_of<uint8_t>(data);
  STD_TORCH_CHECK(kind.width == 1 || reinterpret_cast<uintptr_t>(bytes) % 2 == 0,
                  "data: expected whole words");
  uint16_t* halves = reinterpret_cast<uint16_t*>(bytes);
  if (kind.width == 1)
    body(Bytes{bytes}, count);
  else if (kind.shift == 10)
    body(Halves<10>{halves}, count);
  else
    body(Halves<7>{halves}, count);
}

Tensor histogram(const Tensor& data, int64_t kind_id) {
  const Kind kind(kind_id);
  const Tensor out = torch::stable::empty({kind.alphabet()}, ScalarType::Long);
  int64_t* counts = data_of<int64_t>(out);
  std::fill(counts, counts + kind.alphabet(), 0);
  with_elements(kind, data, [&](const auto& elements, int64_t count) {
    std::vector<int64_t> four(4 *
                              kind.alphabet());  // neighbours are often alike: not one counter after itself
    for (int64_t i = 0; i < count; ++i) ++four[(i & 3) * kind.alphabet() + elements.symbol(i)];
    for (int64_t i = 0; i < int64_t(four.size()); ++i) counts[i % kind.alphabet()] += four[i];
  });
  return out;
}

void push_weights(Tensor words, Tensor counters, const Tensor& data, const Tensor& frequencies,
                  int64_t kind_id) {
  const Kind kind(kind_id);
  const Table table(frequencies);
  with_elements(kind, data, [&](const auto& elements, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t s = elements.symbol(i);
      STD_TORCH_CHECK(s < table.frequency.size() && table.frequency[s] > 0,
                      "data: expected symbols whose frequency is not zero");
    }
    Open open(words, counters, 2 * count);
    Stack stack = open.stack;
    const int plain = kind.plain();
    if (plain)
      stack.push(count, [&](int64_t i, uint32_t& x) { stack.push_uniform(x, elements.plain(i), plain); });
    const uint32_t *start = table.start.data(), *frequency = table.frequency.data();
    stack.push(count, [&](int64_t i, uint32_t& x) {
      const uint32_t s = elements.symbol(i);
      stack.push_slots(x, start[s], frequency[s]);
    });
    open.stack = stack;
    open.close();
  });
}

void pop_weights(Tensor words, Tensor counters, Tensor out, const Tensor& frequencies, int64_t kind_id) {
  const Kind kind(kind_id);
  const Table table(frequencies);
  STD_TORCH_CHECK(int64_t(table.frequency.size()) <= kind.alphabet(), "frequencies: expected fewer symbols");
  with_elements(kind, out, [&](const auto& elements, int64_t count) {
    Open open(words, counters, 0);
    Stack stack = open.stack;
    const uint32_t *start = table.start.data(), *frequency = table.frequency.data();
    const uint16_t* symbol = table.symbol.data();
    stack.pop(count, [&](int64_t i, uint32_t& x) {
      const uint32_t slot = x & (kSlots - 1), s = symbol[slot];
      x = frequency[s] * (x >> kTableBits) + slot - start[s];
      elements.set_symbol(i, s);
    });
    const int plain = kind.plain();
    if (plain)
      stack.pop(count, [&](int64_t i, uint32_t& x) { elements.set_plain(i, Stack::pop_uniform(x, plain)); });
    open.stack = stack;
    open.close();
  });
}

qr::Machine machine_of(int64_t path) {
  STD_TORCH_CHECK(-1 <= path && path <= 2, "path: expected -1 to 2");
  return {path < 0 ? isa() : std::min(Isa(path), isa()), torch::stable::get_num_threads()};
}

Integers integers_of(int64_t p, int64_t m, int64_t bits, const Tensor& values, const Tensor& signs) {
  check_bits(bits);
  STD_TORCH_CHECK(bits >= 2 && 0 <= p && p <= m,
                  "bits, rows: expected 2 to 16 bits, no more rows than columns");
  const Integers integers{p, m, int(bits), data_of<int32_t>(values), data_of<int32_t>(signs)};
  check_vector("integers", values, ScalarType::Int, integers.count());
  check_vector("signs", signs, ScalarType::Int, p);
  const int64_t end = int64_t(1) << bits;
  for (int64_t i = 0; i < integers.count(); ++i)
    STD_TORCH_CHECK(0 <= integers.values[i] && integers.values[i] < end,
                    "integers: expected 0 to 2^bits - 1");
  return integers;
}

Tensor rows_of(const Tensor& x) {
  check_dtype("rows", x, ScalarType::Double);
  STD_TORCH_CHECK(x.dim() == 2, "rows: expected two axes");
  return torch::stable::clone(torch::stable::contiguous(x));
}

Tensor rotate(const Tensor& rows, const Tensor& values, const Tensor& signs, int64_t bits, int64_t path) {
  const Tensor out = rows_of(rows);
  const int64_t m = rows.size(1), p = signs.numel();
  const Integers integers = integers_of(p, m, bits, values, signs);
  const qr::Machine machine = machine_of(path);
  std::vector<double> matrix(p * m);
  qr::Reflectors reflectors(matrix.data(), p, m);
  make_reflectors(reflectors, integers, machine.isa);
  apply_transposed(reflectors, false, data_of<double>(out), out.size(0), machine);
  return out;
}

void push_rotation(Tensor words, Tensor counters, const Tensor& rows, const Tensor& variance,
                   const Tensor& values, const Tensor& signs, int64_t bits, int64_t path) {
  const Tensor matrix = rows_of(rows);
  const int64_t p = rows.size(0), m = rows.size(1);
  check_vector("variance", variance, ScalarType::Double, p);
  const Integers integers = integers_of(p, m, bits, values, signs);
  const qr::Machine machine = machine_of(path);
  Open open(words, counters, 2 * integers.count() + p);
  qr::Reflectors reflectors(data_of<double>(matrix), p, m);
  correct_rotation(open.stack, reflectors, data_of<double>(variance), integers, machine);
  open.close();
}

std::tuple<Tensor, Tensor> pop_rotation(Tensor words, Tensor counters, const Tensor& rows,
                                        const Tensor& variance, int64_t bits, int64_t path) {
  const Tensor matrix = rows_of(rows);
  const int64_t p = rows.size(0), m = rows.size(1);
  check_vector("variance", variance, ScalarType::Double, p);
  STD_TORCH_CHECK(p <= m, "rows: expected no more rows than columns");
  const Integers shape{p, m, int(bits), nullptr, nullptr};
  const Tensor values = torch::stable::empty({shape.count()}, ScalarType::Int);
  const Tensor signs = torch::stable::empty({p}, ScalarType::Int);
  std::fill(data_of<int32_t>(values), data_of<int32_t>(values) + shape.count(), 0);
  const Integers integers = integers_of(p, m, bits, values, signs);
  const qr::Machine machine = machine_of(path);
  Open open(words, counters, 0);
  qr::Reflectors reflectors(data_of<double>(matrix), p, m);
  recover_rotation(open.stack, reflectors, data_of<double>(variance), integers, machine);
  open.close();
  return {values, signs};
}

}  // namespace
}  // namespace gaugekit::bitsback

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CPU, m) {
  m.impl("bitsback_push_uniform", TORCH_BOX(&gaugekit::bitsback::push_uniform));
  m.impl("bitsback_pop_uniform", TORCH_BOX(&gaugekit::bitsback::pop_uniform));
  m.impl("bitsback_histogram", TORCH_BOX(&gaugekit::bitsback::histogram));
  m.impl("bitsback_push_weights", TORCH_BOX(&gaugekit::bitsback::push_weights));
  m.impl("bitsback_pop_weights", TORCH_BOX(&gaugekit::bitsback::pop_weights));
  m.impl("bitsback_rotate", TORCH_BOX(&gaugekit::bitsback::rotate));
  m.impl("bitsback_push_rotation", TORCH_BOX(&gaugekit::bitsback::push_rotation));
  m.impl("bitsback_pop_rotation", TORCH_BOX(&gaugekit::bitsback::pop_rotation));
}
