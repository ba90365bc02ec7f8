// Qualifiers of functions that are compiled for the host and for the device.
#pragma once

#if defined(__CUDACC__)
#define DIFFGAP_HD __host__ __device__ __forceinline__
#else
// Always inlined, so that a caller compiled for AVX-512 gets its own AVX-512 copy (see cpu/isa.h).
#define DIFFGAP_HD inline __attribute__((always_inline))
#endif
