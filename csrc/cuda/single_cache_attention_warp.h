// The instructions of compute capability 9.0 that common/single_cache_warp.h is written on, and its kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/single_cache_warp.h"

namespace gaugekit::cache {
namespace {

template <bool HALF>
struct Numbers {
  static __device__ __forceinline__ Pair unpack(uint32_t word) {
    if constexpr (HALF) {
      const float2 x = __half22float2(reinterpret_cast<const __half2&>(word));
      return {{x.x, x.y}};
    } else {
      return {{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)}};
    }
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (HALF) {
      const __half2 x = __floats2half2_rn(low, high);
      return reinterpret_cast<const uint32_t&>(x);
    } else {
      const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
      return reinterpret_cast<const uint32_t&>(x);
    }
  }
  static __device__ __forceinline__ float widen(uint16_t bits) { return unpack(bits).of[0]; }
};

// One thread of a block. Places are bytes of the block's shared memory.
template <bool HALF>
struct Machine : Numbers<HALF> {
  char* shared;
  uint32_t base;  // of shared memory, as its instructions count
  int lane, warp;

  __device__ explicit Machine(char* block)
      : shared(block),
        base(static_cast<uint32_t>(__cvta_generic_to_shared(block))),
        lane(threadIdx.x % kLanes),
        warp(__shfl_sync(~0u, threadIdx.x / kLanes, 0)) {}  // the same in all lanes, and known to be
  __device__ __forceinline__ uint32_t barrier(int stage) const { return base + kScoreBytes + 8 * stage; }
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier(stage)) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
  }
  __device__ __forceinline__ void expect(int stage, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier(stage)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void copy(int stage, int to, const void* from, int bytes) const {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(base +
                                                                                                        to),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier(stage))
        : "memory");
  }
  __device__ __forceinline__ void wait(int stage, int phase) const {
    uint32_t done;
    do {
      asm volatile(
          "{.reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;}"
          : "=r"(done)
          : "r"(barrier(stage)), "r"(phase)
          : "memory");
    } while (!done);
  }
  // 2 to the x; a result below the normal numbers is 0.
  __device__ __forceinline__ float power(float x) const {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
  }
  // The number itself, but nothing that follows from it is worth keeping in a register from turn to turn.
  __device__ __forceinline__ uint32_t fresh(uint32_t x) const {
    asm volatile("" : "+r"(x));
    return x;
  }
  // One lane of the warp, and the compiler knows that it is one.
  __device__ __forceinline__ bool elected() const {
    uint32_t chosen;
    asm volatile(
        "{.reg .pred one;\n"
        "elect.sync _|one, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, one;}"
        : "=r"(chosen));
    return chosen;
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ float exchange(float x, int mask) const { return __shfl_xor_sync(~0u, x, mask); }
  __device__ __forceinline__ void load(int place, uint32_t (&x)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(base + place));
  }
  __device__ __forceinline__ void load_transposed(int place, uint32_t (&x)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(base + place));
  }
  __device__ __forceinline__ void multiply_add(float* sum, const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) const {
    if constexpr (HALF)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
          "{%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
          "{%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

constexpr int kCombineThreads = 128;

// Blocks on a multiprocessor: two where registers and shared memory let them, since one waits while its warps
// take the softmax.
constexpr int blocks_of(Form form, int steps) { return steps > (form == Form::means ? 4 : 8) ? 1 : 2; }

template <bool HALF, Form FORM, int STEPS>
__global__ void __launch_bounds__(kWarps* kLanes, blocks_of(FORM, STEPS))
    _single_cache_attention_split(const __grid_constant__ Call f) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char block[];
  Machine<HALF> m(block);
  attend_split<FORM, STEPS>(m, f, blockIdx.y, blockIdx.x);
#endif
}

// A thread a channel of the output [B, T, H, V]: x is the query row, y the sequence and group.
template <bool HALF>
__global__ void __launch_bounds__(kCombineThreads)
    _single_cache_attention_combine(const __grid_constant__ Call f, uint16_t* out) {
  const int c = blockIdx.z * kCombineThreads + threadIdx.x, r = blockIdx.x, pair = blockIdx.y;
  if (c >= f.values) return;
  const int64_t head = int64_t(pair % f.groups) * f.repeats + r / f.queries;
  const int64_t row = (int64_t(pair / f.groups) * f.queries + r % f.queries) * f.groups * f.repeats + head;
  const float value = combined<Numbers<HALF>>(f, pair, r, c);
  out[row * f.values + c] = static_cast<uint16_t>(Numbers<HALF>::pack(value, 0));
}

}  // namespace
}  // namespace gaugekit::cache
