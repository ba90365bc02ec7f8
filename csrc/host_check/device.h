// CUDA's names for a host compiler, as far as csrc/cuda/*.cuh use them; host_check/blocks.h runs the threads.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_check/blocks.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// All shared memory is in one section, so that it can be poisoned between blocks.
#define __shared__ static __attribute__((section("shared_memory")))
#define threadIdx (host_check::this_thread().index)
#define blockIdx (host_check::this_thread().block)
#define blockDim (host_check::launched().block)
#define gridDim (host_check::launched().grid)

using host_check::dim3;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void __syncthreads(host_check::Site site = {}) { host_check::wait_for_block(site); }

inline float __shfl_xor_sync(uint32_t mask, float value, int lane_mask, host_check::Site site = {}) {
  return host_check::exchange_with(mask, value, lane_mask, site);
}
