// gaugekit::packed_linear_rows on the GPU: up to 16 rows of x, in one of two ways. Variant 0: a warp a row of
// W, K split in a fixed way and its parts added in order by a second kernel; what a lane does stands in
// common/packed_lane.h. Variant 1, for x of the weights' dtype: packed_linear_tile.h. Tests run the lanes of
// both on the processor.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common/check.h"
#include "cuda/packed_linear_tile.h"

namespace gaugekit::packed {
namespace {

constexpr int kWarps = 8, kMostRows = 16, kBlock = 64;
constexpr int64_t kLaneVariant = 0, kTileVariant = 1;
constexpr int64_t kPrograms = 2048;  // warps' blocks that fill the largest GPU; no result depends on the card

template <bool HALF, int C, class X, int T>
__global__ void __launch_bounds__(kWarps* kLanes, sizeof(X) == 4 ? 1 : 2)
    _packed_linear(Lanes w, const X* x, int batch, int64_t segments_each, float* parts) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row = blockIdx.x * int64_t(kWarps) + threadIdx.x / kLanes;
  if (row >= w.rows) return;
  const int64_t first = blockIdx.y * segments_each, stop = min(first + segments_each, w.segments);
  const uint32_t window = w.window[row];
  float sum[T] = {};
  for (int64_t segment = first; segment < stop; ++segment) {
    const Lane<HALF, C> own = load_lane<HALF, C>(w, row, segment, lane);
    const int count = count_bits(own.escaped);
    int before = count;
    for (int step = 1; step < kLanes; step *= 2) {
      const int lower = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += lower;
    }
    const int64_t k = segment * kSegment + lane * kLaneWeights, width = w.blocks * kBlock;
    if (k < width)
      multiply_lane<HALF, C, X, T>(w, own, window, begin_of(w, row, segment) + before - count, x + k, width,
                                   batch, sum);
  }
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (t >= batch) break;
    for (int step = kLanes / 2; step; step /= 2) sum[t] += __shfl_xor_sync(~0u, sum[t], step);
    if (lane == 0) parts[(int64_t(blockIdx.y) * batch + t) * w.rows + row] = sum[t];
  }
}

// out [batch, rows] = the parts [splits, batch, rows] in their order, and the bias.
template <class X>
__global__ void _packed_linear_total(const float* parts, int64_t splits, int64_t count, int64_t rows,
                                     const X* bias, X* out) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  float total = 0;
  for (int64_t split = 0; split < splits; ++split) total += parts[split * count + i];
  if (bias) total += widen(bias[i % rows]);
  put(out + i, total);
}

// x [M, 64 B] with zeros beyond its columns, at a multiple of 16 bytes: x itself where it is that already.
Tensor whole_blocks(const Tensor& x, int64_t blocks) {
  if (x.size(1) == blocks * kBlock && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0) return x;
  Tensor whole = torch::stable::new_zeros(x, {x.size(0), blocks * kBlock});
  Tensor part = torch::stable::narrow(whole, 1, 0, x.size(1));
  torch::stable::copy_(part, x);
  return whole;
}

template <bool HALF, class X>
void launch(const Lanes& w, int code_bits, const Tensor& x, const Optional& bias, int64_t batch, Tensor& out,
            cudaStream_t stream) {
  const int64_t blocks = (w.rows + kWarps - 1) / kWarps;
  const int64_t wanted = std::clamp<int64_t>(kPrograms / blocks, 1, w.segments);
  const int64_t each = (w.segments + wanted - 1) / wanted, splits = (w.segments + each - 1) / each;
  Tensor parts = torch::stable::new_empty(x, {splits, batch, w.rows}, ScalarType::Float);
  float* to = static_cast<float*>(parts.mutable_data_ptr());
  const X* from = static_cast<const X*>(x.const_data_ptr());
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
  const auto start = [&](auto kernel) {
    kernel<<<grid, kWarps * kLanes, 0, stream>>>(w, from, static_cast<int>(batch), each, to);
  };
  if (batch == 1)
    code_bits == 3 ? start(_packed_linear<HALF, 3, X, 1>) : start(_packed_linear<HALF, 4, X, 1>);
  else
    code_bits == 3 ? start(_packed_linear<HALF, 3, X, kMostRows>)
                   : start(_packed_linear<HALF, 4, X, kMostRows>);
  const int64_t count = batch * w.rows;
  const X* shift = bias ? static_cast<const X*>(bias->const_data_ptr()) : nullptr;
  _packed_linear_total<X><<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream>>>(
      to, splits, count, w.rows, shift, static_cast<X*>(out.mutable_data_ptr()));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "packed_linear_rows: ", cudaGetErrorString(error));
}

template <bool HALF, class X>
void launch_tile(const Lanes& w, int code_bits, const Tensor& x, const Optional& bias, int64_t batch,
                 Tensor& out, cudaStream_t stream) {
  const int64_t shared = tile_shared_bytes(w);
  const X* shift = bias ? static_cast<const X*>(bias->const_data_ptr()) : nullptr;
  const auto start = [&](auto kernel) {
    // A block may have 48 KiB without asking, of which 16 are the kernel's own.
    if (shared > 32 * 1024) {
      const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      STD_TORCH_CHECK(error == cudaSuccess, "packed_linear_rows: ", cudaGetErrorString(error));
    }
    kernel<<<static_cast<unsigned>((w.rows + kTileRows - 1) / kTileRows), kTileWarps * kLanes, shared,
             stream>>>(w, static_cast<const X*>(x.const_data_ptr()), static_cast<int>(batch), shift,
                       static_cast<X*>(out.mutable_data_ptr()));
  };
  if (batch <= kTileColumns)
    code_bits == 3 ? start(_packed_linear_tile<HALF, 3, 1, X>) : start(_packed_linear_tile<HALF, 4, 1, X>);
  else
    code_bits == 3 ? start(_packed_linear_tile<HALF, 3, 2, X>) : start(_packed_linear_tile<HALF, 4, 2, X>);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "packed_linear_rows: ", cudaGetErrorString(error));
}

// The packed matrix, once its parts are known to fit each other and x.
Lanes checked(const Tensor& x, const Tensor& raw, const Tensor& planes, const Tensor& escapes,
              const Tensor& offsets, const Tensor& window) {
  STD_TORCH_CHECK(
      x.dim() == 2 && 0 < x.size(0) && x.size(0) <= kMostRows && x.size(1) > 0 && x.is_contiguous(),
      "x: expected a contiguous [M, K], M at most 16");
  STD_TORCH_CHECK(raw.dim() == 2 && planes.dim() == 3 && escapes.dim() == 1 && raw.size(0) > 0,
                  "raw, planes, escapes: expected [N, 64 B], [N, P, B] and [E]");
  const int64_t columns = x.size(1), rows = raw.size(0), blocks = (columns + 63) / 64, count = planes.size(1);
  const int64_t segments = (columns + kSegment - 1) / kSegment;
  STD_TORCH_CHECK(count == 3 || count == 4 || count == 6 || count == 7,
                  "planes: expected 3, 4, 6 or 7 a block");
  check_dtype("raw", raw, ScalarType::Byte);
  check_dtype("planes", planes, ScalarType::Long);
  check_dtype("escapes", escapes, ScalarType::Byte);
  check_dtype("offsets", offsets, ScalarType::Int);
  check_dtype("window", window, ScalarType::Byte);
  check_shape("raw", raw, {rows, blocks * 64});
  check_shape("planes", planes, {rows, count, blocks});
  check_shape("offsets", offsets, {rows * segments + 1});
  check_shape("window", window, {rows});
  const int device = x.get_device_index();
  for (const Tensor* part : {&raw, &planes, &escapes, &offsets, &window})
    STD_TORCH_CHECK(part->is_contiguous() && part->get_device_index() == device,
                    "raw, planes, escapes, offsets, window: expected contiguous tensors on x's device");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(raw.const_data_ptr()) % 16 == 0,
                  "raw: expected it to begin at a multiple of 16 bytes");
  return Lanes{static_cast<const uint8_t*>(raw.const_data_ptr()),
               static_cast<const uint32_t*>(planes.const_data_ptr()),
               static_cast<const uint8_t*>(escapes.const_data_ptr()),
               static_cast<const int32_t*>(offsets.const_data_ptr()),
               static_cast<const uint8_t*>(window.const_data_ptr()),
               rows,
               blocks,
               segments,
               escapes.numel()};
}

Tensor linear_rows(const Tensor& x, const Tensor& raw, const Tensor& planes, const Tensor& escapes,
                   const Tensor& offsets, const Tensor& window, const Optional& bias, int64_t variant) {
  const Lanes w = checked(x, raw, planes, escapes, offsets, window);
  const int64_t count = planes.size(1), batch = x.size(0);
  const bool half = count > 4;
  const ScalarType dtype = x.scalar_type(), own = half ? ScalarType::Half : ScalarType::BFloat16;
  STD_TORCH_CHECK(dtype == own || dtype == ScalarType::Float, "x: expected the weights' dtype or float32");
  STD_TORCH_CHECK(
      variant == kLaneVariant || (variant == kTileVariant && dtype == own && x.size(1) <= kMostTileColumns),
      "variant: expected 0, or 1 for x of the weights' dtype and at most 32768 columns, got ", variant);
  const int device = x.get_device_index();
  if (bias) {
    check_shape("bias", *bias, {w.rows});
    check_dtype("bias", *bias, dtype);
    STD_TORCH_CHECK(bias->is_contiguous() && bias->get_device_index() == device,
                    "bias: expected it contiguous on x's device");
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  const int code_bits = static_cast<int>(half ? count - 3 : count);
  const Tensor whole = whole_blocks(x, w.blocks);
  Tensor out = torch::stable::new_empty(x, {batch, w.rows});
  if (variant == kTileVariant)
    half ? launch_tile<true, Float16Bits>(w, code_bits, whole, bias, batch, out, stream)
         : launch_tile<false, BFloat16Bits>(w, code_bits, whole, bias, batch, out, stream);
  else if (dtype == ScalarType::Float)
    half ? launch<true, float>(w, code_bits, whole, bias, batch, out, stream)
         : launch<false, float>(w, code_bits, whole, bias, batch, out, stream);
  else if (half)
    launch<true, Float16Bits>(w, code_bits, whole, bias, batch, out, stream);
  else
    launch<false, BFloat16Bits>(w, code_bits, whole, bias, batch, out, stream);
  return out;
}

}  // namespace
}  // namespace gaugekit::packed

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CUDA, m) {
  m.impl("packed_linear_rows", TORCH_BOX(&gaugekit::packed::linear_rows));
}
