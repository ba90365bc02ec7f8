// Kernels with one mistake each, which the host check finds or shows.
#pragma once

#include <map>
#include <stdexcept>
#include <string>

#include "host_check/device.h"

namespace host_check {

struct FaultArgs {
  float* data;
  int64_t size;
};

__global__ void divergent_barrier(FaultArgs) {
  if (threadIdx.x % 2 == 0) __syncthreads();
}

__global__ void two_barriers(FaultArgs) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void missing_lane(FaultArgs a) {
  if (threadIdx.x != 5) a.data[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
}

__global__ void lane_outside_the_mask(FaultArgs a) {
  if (threadIdx.x < 16) a.data[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1.0f, 16);
}

__global__ void write_at_size(FaultArgs a) {
  if (threadIdx.x == 3) a.data[a.size] = 1.0f;
}

__global__ void read_before(FaultArgs a) {
  if (threadIdx.x == 3) a.data[0] = a.data[-1];
}

__global__ void misaligned(FaultArgs a) {
  if (threadIdx.x == 0) reinterpret_cast<uint4*>(a.data + 1)->x = 1;
}

// Correct threads in the order of their numbers alone: there is no barrier.
__global__ void missing_barrier(FaultArgs a) {
  __shared__ float first;
  if (threadIdx.x == 0) first = 1.0f;
  a.data[threadIdx.x] = first;
}

// What a thread leaves for the other warp is overwritten by the next round: a barrier is missing at its end.
__global__ void warp_ahead(FaultArgs a) {
  __shared__ float left[64];
  for (int round = 0; round < 2; ++round) {
    left[threadIdx.x] = static_cast<float>(round);
    __syncthreads();
    a.data[threadIdx.x] += left[63 - threadIdx.x] - static_cast<float>(round);
  }
}

__global__ void unwritten_shared_memory(FaultArgs a) {
  __shared__ float values[64];
  if (blockIdx.x == 0) values[threadIdx.x] = 1.0f;
  __syncthreads();
  a.data[threadIdx.x] = values[threadIdx.x];
}

inline void run_fault(const std::string& name, uintptr_t data, int64_t size) {
  static const std::map<std::string, void (*)(FaultArgs)> kernels{
      {"divergent_barrier", divergent_barrier},
      {"two_barriers", two_barriers},
      {"missing_lane", missing_lane},
      {"lane_outside_the_mask", lane_outside_the_mask},
      {"write_at_size", write_at_size},
      {"read_before", read_before},
      {"misaligned", misaligned},
      {"missing_barrier", missing_barrier},
      {"warp_ahead", warp_ahead},
      {"unwritten_shared_memory", unwritten_shared_memory},
  };
  const FaultArgs args{reinterpret_cast<float*>(data), size};
  run({{2, 1, 1}, {64, 1, 1}}, [&] { kernels.at(name)(args); });
}

}  // namespace host_check
