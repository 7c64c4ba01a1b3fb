// gaugekit::single_cache_attention_rows on the GPU: attention from one cache of 16-bit numbers for up to 16
// query rows a group. What a block does with a split of the rows stands in common/single_cache_warp.h, whose
// threads a test runs on the processor; what splits leave is added up in their order by a second kernel.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common/single_cache_arguments.h"
#include "cuda/single_cache_attention_warp.h"

namespace gaugekit::cache {
namespace {

constexpr int64_t kMostPairs = 65535;

struct Given : CacheArguments {
  int64_t steps() const {
    return (q.size(3) / 2 + kStepChannels * kWarps - 1) / (kStepChannels * kWarps) * 2;
  }

  void check() const;
  void check_layout() const;
  void check_dense(const char* name, const Optional& x, ScalarType dtype,
                   std::initializer_list<int64_t> sizes) const {
    if (!x) return;
    check_dtype(name, *x, dtype);
    check_shape(name, *x, sizes);
    STD_TORCH_CHECK(x->is_contiguous() && x->get_device_index() == q.get_device_index(), name,
                    ": expected it contiguous on q's device");
  }
};

// What the kernel takes: gaugekit/ops/single_cache_attention/choice.py asks the same beforehand.
void Given::check() const {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "q: expected bfloat16 or float16");
  check_dtype("cache", cache, dtype);
  STD_TORCH_CHECK(q.dim() == 4 && cache.dim() == 4 && q.numel() > 0 && cache.numel() > 0 &&
                      cache.size(3) == q.size(3) && q.size(1) % cache.size(1) == 0 &&
                      cache.get_device_index() == q.get_device_index(),
                  "q, cache: expected [B, H, T, C] and [B, G, S, C] on one device, G dividing H");
  const int64_t channels = q.size(3), queries = q.size(2), rows = repeats() * queries;
  STD_TORCH_CHECK(channels % 32 == 0 && steps() <= kMostSteps,
                  "q: expected C a multiple of 32 and at most 2048, got ", channels);
  STD_TORCH_CHECK(rows + (gamma && width() == channels ? queries : 0) <= kQueryRows,
                  "q: expected H / G times T at most 16, with gamma and whole rows T less");
  STD_TORCH_CHECK(!slices || (channels % repeats() == 0 && width() % kStepChannels == 0),
                  "slices: expected widths that are multiples of 16");
  STD_TORCH_CHECK(!gamma || width() == channels || (queries <= kQueryRows / 2 && !cos),
                  "gamma: expected at most 8 queries beside slices, and no cos");
  STD_TORCH_CHECK(bool(cos) == bool(sin) && (cos || !key_gain), "cos, sin: expected together");
  STD_TORCH_CHECK(!window || *window > 0, "window: expected a positive number");
  STD_TORCH_CHECK(0 < keys() && keys() <= kFar && q.size(0) * cache.size(1) <= kMostPairs,
                  "cache: expected at most 2^29 rows and 65535 sequences and groups");
  for (const Optional* gain : {&alpha, &beta, &gamma})
    check_dense("alpha, beta, gamma", *gain, ScalarType::Float, {q.size(1)});
  check_dense("query_start", query_start, ScalarType::Long, {q.size(0)});
  check_dense("key_lengths", key_lengths, ScalarType::Long, {q.size(0)});
  check_layout();
}

void Given::check_layout() const {
  STD_TORCH_CHECK(q.stride(3) == 1 && reinterpret_cast<uintptr_t>(q.const_data_ptr()) % 4 == 0,
                  "q: expected neighbouring channels at a multiple of 4 bytes");
  STD_TORCH_CHECK(cache.stride(3) == 1 && reinterpret_cast<uintptr_t>(cache.const_data_ptr()) % 16 == 0,
                  "cache: expected neighbouring channels at a multiple of 16 bytes");
  for (int axis = 0; axis < 3; ++axis)
    STD_TORCH_CHECK((q.size(axis) == 1 || q.stride(axis) % 2 == 0) &&
                        (cache.size(axis) == 1 || cache.stride(axis) % 8 == 0),
                    "q, cache: expected strides of an even number and of a multiple of 8");
  if (block_table)
    check_dense("block_table", block_table, ScalarType::Int, {q.size(0), block_table->size(1)});
  else
    STD_TORCH_CHECK(cache.size(0) == q.size(0), "cache: expected as many sequences as q");
  if (!cos) return;
  const int64_t pairs = cos->dim() == 2 ? cos->size(1) : 0;
  STD_TORCH_CHECK(pairs > 0 && pairs % kStepChannels == 0 && 2 * pairs <= q.size(3) &&
                      cos->size(0) >= keys() && steps() <= kMostTurnedSteps,
                  "cos: expected [at least S, a multiple of 16], and C at most 512");
  for (const Optional* table : {&cos, &sin}) {
    check_dense("cos, sin", *table, ScalarType::Float, {cos->size(0), pairs});
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>((*table)->const_data_ptr()) % 16 == 0,
                    "cos, sin: expected them to begin at a multiple of 16 bytes");
  }
  check_dense("key_gain", key_gain, ScalarType::Float, {q.size(3)});
}

template <class X>
const X* data(const Optional& x) {
  return x ? static_cast<const X*>(x->const_data_ptr()) : nullptr;
}

Call call_of(const Given& given, double scale) {
  const Tensor &q = given.q, &cache = given.cache;
  Call f{};
  f.q = static_cast<const uint32_t*>(q.const_data_ptr());
  f.q_batch = q.stride(0) / 2, f.q_head = q.stride(1) / 2, f.q_query = q.stride(2) / 2;
  f.cache = static_cast<const char*>(cache.const_data_ptr());
  f.batch_bytes = 2 * cache.stride(0), f.group_bytes = 2 * cache.stride(1), f.row_bytes = 2 * cache.stride(2);
  f.table = data<int32_t>(given.block_table);
  f.pages = given.block_table ? given.block_table->size(1) : 0;
  f.start = data<int64_t>(given.query_start), f.lengths = data<int64_t>(given.key_lengths);
  f.gain = data<float>(given.key_gain), f.cos = data<float>(given.cos), f.sin = data<float>(given.sin);
  f.alpha = data<float>(given.alpha), f.beta = data<float>(given.beta), f.gamma = data<float>(given.gamma);
  f.page = static_cast<int>(cache.size(2));
  f.queries = static_cast<int>(q.size(2)), f.keys = static_cast<int>(given.keys());
  f.groups = static_cast<int>(cache.size(1)), f.repeats = static_cast<int>(given.repeats());
  f.width = static_cast<int>(q.size(3)), f.values = static_cast<int>(given.width());
  f.pairs = given.cos ? static_cast<int>(given.cos->size(1)) : 0;
  f.splits = (f.keys + kSplit - 1) / kSplit;
  f.window = given.window ? static_cast<int>(std::min<int64_t>(*given.window, kFar)) : 0;
  f.causal = given.causal;
  f.scale = static_cast<float>(scale) * kLog2E;
  return f;
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "single_cache_attention_rows: ", cudaGetErrorString(error));
}

template <bool HALF, Form FORM, int STEPS>
void launch_splits(const Call& f, unsigned pairs, cudaStream_t stream) {
  const auto kernel = _single_cache_attention_split<HALF, FORM, STEPS>;
  const int shared = Stage<STEPS>::place(kStages, f.pairs);
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<dim3(f.splits, pairs), kWarps * kLanes, shared, stream>>>(f);
}

template <bool HALF, Form FORM>
void launch_widths(const Call& f, int64_t steps, unsigned pairs, cudaStream_t stream) {
  if (steps <= 4)
    launch_splits<HALF, FORM, 4>(f, pairs, stream);
  else if (steps <= 8)
    launch_splits<HALF, FORM, 8>(f, pairs, stream);
  else
    launch_splits<HALF, FORM, kMostSteps>(f, pairs, stream);
}

template <bool HALF>
void launch(const Call& f, int64_t sequences, int64_t steps, const Tensor& out, cudaStream_t stream) {
  const unsigned pairs = static_cast<unsigned>(sequences * f.groups);
  if (f.cos)
    launch_splits<HALF, Form::turned, kMostTurnedSteps>(f, pairs, stream);
  else if (f.gamma && f.sliced())
    launch_widths<HALF, Form::means>(f, steps, pairs, stream);
  else
    launch_widths<HALF, Form::plain>(f, steps, pairs, stream);
  const unsigned columns = (f.values + kCombineThreads - 1) / kCombineThreads;
  _single_cache_attention_combine<HALF><<<dim3(f.rows(), pairs, columns), kCombineThreads, 0, stream>>>(
      f, static_cast<uint16_t*>(out.mutable_data_ptr()));
  check_launch(cudaGetLastError());
}

// Bulk copies are Hopper's; the binary may hold code for older cards too, where these kernels are empty.
void check_card(int device) {
  int major = 0, minor = 0;
  check_launch(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_launch(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  STD_TORCH_CHECK(major == 9 && minor == 0,
                  "single_cache_attention_rows: expected a GPU of compute capability 9.0, got ", major, ".",
                  minor);
}

Tensor attention_rows(const Tensor& q, const Tensor& cache, bool slices, const Optional& alpha,
                      const Optional& beta, const Optional& gamma, const Optional& key_gain,
                      const Optional& cos, const Optional& sin, bool causal,
                      const std::optional<int64_t>& window, const Optional& query_start,
                      const Optional& key_lengths, const Optional& block_table, double scale) {
  const Given given{{q, cache, slices, alpha, beta, gamma, key_gain, cos, sin, causal, window, query_start,
                     key_lengths, block_table}};
  given.check();
  const int device = q.get_device_index();
  check_card(device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  Call f = call_of(given, scale);
  // The parts of all splits in one piece: those stored as pairs begin at a multiple of 8 numbers.
  const int64_t parts = q.size(0) * f.groups * f.splits, sums = parts * f.rows() * f.values;
  const int64_t means = gamma ? parts * f.queries * f.width : 0;
  const Tensor held = torch::stable::new_empty(q, {sums + means + 2 * parts * f.rows()}, ScalarType::Float);
  f.sums = static_cast<float*>(held.mutable_data_ptr());
  f.means = f.sums + sums, f.tops = f.means + means, f.totals = f.tops + parts * f.rows();
  // O lies as [B, T, H, V], so that joining the heads copies nothing.
  const Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), given.width()});
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  if (q.scalar_type() == ScalarType::Half)
    launch<true>(f, q.size(0), given.steps(), out, stream);
  else
    launch<false>(f, q.size(0), given.steps(), out, stream);
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace
}  // namespace gaugekit::cache

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CUDA, m) {
  m.impl("single_cache_attention_rows", TORCH_BOX(&gaugekit::cache::attention_rows));
}
