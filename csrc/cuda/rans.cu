// gaugekit::rans_decode_rows on the GPU: a block a chunk, a warp a segment, in one of two ways. Variant 0
// finds a symbol in the buckets of an alias table (common/rans_lane.h), variant 1 in a table of all slots
// (rans_slots.h). csrc/cpu/rans_rows.cpp runs what the lanes of both do, one lane after another.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/rans_check.h"
#include "cuda/rans_slots.h"

namespace gaugekit::rans {
namespace {

constexpr int kThreads = kLanes;
constexpr int kBlocksPerProcessor = 32;

// Decodes this thread's lane; true if the lane ends where a sound one does.
struct DecodeLane {
  const ChunkRow& row;
  const Sections& sections;
  const LaneTable& table;
  uint8_t* out;

  template <int width, int model>
  __device__ bool kind() const {
    const int segment = threadIdx.x / kSegmentLanes, lane = threadIdx.x % kSegmentLanes;
    const uint32_t words = row.words[segment], below = (1u << lane) - 1;
    const uint32_t place = segment * kSegmentLanes + lane_element(lane);
    uint32_t x = reinterpret_cast<const uint32_t*>(sections.states)[threadIdx.x], next = 0;
    for (uint32_t group = 0; group < row.to; group += kLanes) {
      const uint32_t e = group + place;
      const bool live = e < row.n;
      uint32_t symbol = 0, y = x;
      if (live) y = lane_step(x, table, symbol);
      const uint32_t refills = __ballot_sync(~0u, live && y < kStateLower);
      if (refills >> lane & 1)
        y = y << 16 | word_at(sections, segment, next + __popc(refills & below), words);
      x = y;
      next += __popc(refills);
      if (live && row.from <= e && e < row.to)
        store_element<width>(out, e - row.from,
                             lane_element_bits<width, model>(row, sections, e, symbol, table.shift));
    }
    return row.to < row.n || (x == kStateLower && next == words);
  }
};

__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    _rans_decode_rows(const uint8_t* packed, uint64_t packed_bytes, const ChunkRow* rows, uint8_t* out,
                      uint64_t out_bytes, int32_t* damaged) {
  __shared__ ChunkRow row;
  __shared__ Sections sections;
  __shared__ Table symbols;
  __shared__ Buckets buckets;
  __shared__ LaneTable table;
  __shared__ bool sound;
  if (threadIdx.x == 0) {
    row = rows[blockIdx.x];
    sound = place_sections(row, packed + row.in, packed_bytes, out_bytes, sections);
    if (sound && row.method != kRaw) {
      sound = read_table(sections.table, row.symbols, row.model, symbols) == nullptr;
      if (sound) {
        make_buckets(symbols, buckets);
        fill_lanes(symbols, buckets, table);
      }
    }
  }
  __syncthreads();
  bool good = sound;
  if (sound && row.method == kRaw) {
    const uint8_t* from = packed + row.in + uint64_t(row.from) * row.width;
    const uint64_t bytes = uint64_t(row.to - row.from) * row.width;
    for (uint64_t i = threadIdx.x; i < bytes; i += kThreads) out[row.out + i] = from[i];
  } else if (sound) {
    DecodeLane lane{row, sections, table, out + row.out};
    good = with_lane_kind(row, lane);
  }
  const bool bad = __syncthreads_or(!good);
  if (threadIdx.x == 0) damaged[blockIdx.x] = bad;
}

void rans_decode_rows(const Tensor& packed, const Tensor& rows, Tensor out, Tensor damaged, int64_t variant) {
  const int64_t chunks = check_rows(packed, rows, out, damaged, variant);
  const int device = packed.get_device_index();
  STD_TORCH_CHECK(rows.get_device_index() == device && out.get_device_index() == device &&
                      damaged.get_device_index() == device,
                  "packed, rows, out, damaged: expected tensors of one device");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0,
                  "packed: expected it to begin at a multiple of 16 bytes");
  if (chunks == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto decode = variant == 0 ? _rans_decode_rows : _rans_decode_slots;
  decode<<<unsigned(chunks), variant == 0 ? kThreads : kSlotThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint8_t*>(packed.const_data_ptr()), packed.numel(),
      static_cast<const ChunkRow*>(rows.const_data_ptr()), static_cast<uint8_t*>(out.mutable_data_ptr()),
      out.numel(), static_cast<int32_t*>(damaged.mutable_data_ptr()));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "rans_decode_rows: ", cudaGetErrorString(error));
}

}  // namespace
}  // namespace gaugekit::rans

STABLE_TORCH_LIBRARY_IMPL(gaugekit, CUDA, m) {
  m.impl("rans_decode_rows", TORCH_BOX(&gaugekit::rans::rans_decode_rows));
}
