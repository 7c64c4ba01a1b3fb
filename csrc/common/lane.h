// What host and device share: one name for a function of both, one for a function that calls what exists on
// the device only, one that has a function inlined. Free of torch, and of CUDA's headers.
#pragma once

#ifdef __CUDACC__
#define GAUGEKIT_HD __host__ __device__
#define GAUGEKIT_DEVICE __device__
#define GAUGEKIT_INLINE __forceinline__
#else
#define GAUGEKIT_HD
#define GAUGEKIT_DEVICE
#define GAUGEKIT_INLINE inline __attribute__((always_inline))
#endif
