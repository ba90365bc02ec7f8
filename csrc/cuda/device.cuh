// What device code needs of its compiler: nvcc's own, or for a host compiler csrc/host_check's emulation of it. Device
// code is in .cuh files and knows nothing of torch, so that both can compile it.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "host_check/device.h"
#endif

#include <cstdint>
#include <cstring>

#include "common/macros.h"

#define DIFFGAP_DEVICE __device__ __forceinline__
