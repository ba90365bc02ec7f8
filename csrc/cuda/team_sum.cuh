// Sums over a team (launch.cuh) whose threads may be a fraction of a warp or several warps.
#pragma once

#include "cuda/device.cuh"

namespace diffgap {

constexpr int kMaxRowThreads = 512;  // of a block that reduces
constexpr unsigned kWarp = 32;

// Every thread of the team gets the sums, added in an order that depends on the team's width alone. All threads of the
// block must call it. Consecutive sums use two buffers in turn, so that one barrier each is enough.
struct TeamSum {
  unsigned buffer = 0;

  template <int n>
  DIFFGAP_DEVICE void operator()(float (&x)[n]) {
    __shared__ float partial[2][n][kMaxRowThreads / kWarp];
#pragma unroll
    for (unsigned distance = kWarp / 2; distance > 0; distance /= 2) {
      if (distance >= blockDim.x) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] += __shfl_xor_sync(0xFFFFFFFFu, x[i], distance);
    }
    if (blockDim.x <= kWarp) return;
    const unsigned warps = blockDim.x / kWarp, first = threadIdx.y * warps;
    auto& sums = partial[buffer];
    buffer ^= 1;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < n; ++i) sums[i][first + threadIdx.x / kWarp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = 0.0f;
      for (unsigned warp = 0; warp < warps; ++warp) x[i] += sums[i][first + warp];
    }
  }
};

}  // namespace diffgap
