// Runs a loop in the widest vector instructions of the machine, chosen once at run time: one binary serves
// every x86-64, and other architectures take the compiler's baseline.
//
// A `Body` is a struct with a static, always inlined `run`; everything it calls must be always inlined too
// (DIFFGAP_HD), because only then is it compiled anew for each instruction set. `run_vectorised` leaves the vectors
// to the compiler; `run_blocked` calls `run<Vectors<...>>`, for loops that are blocked by hand.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/macros.h"

namespace diffgap {

// float32 lanes of a vector, and whether there is an instruction that multiplies pairs of bfloat16.
template <int kLanes, bool kBfloat16Pairs = false>
struct Vectors {
  static constexpr int lanes = kLanes;
  static constexpr bool bfloat16_pairs = kBfloat16Pairs;
};

template <typename Body, typename... Args>
__attribute__((noinline)) void run_baseline(const Args&... args) {
  Body::run(args...);
}

#if defined(__x86_64__) && defined(__GNUC__)

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The widest the machine has; the variable DIFFGAP_CPU_ISA = avx512, avx2 or baseline lowers it, for tests.
inline Isa detect_isa() {
  const char* limit = std::getenv("DIFFGAP_CPU_ISA");
  const bool baseline = limit && std::strcmp(limit, "baseline") == 0;
  const bool narrow = limit && std::strcmp(limit, "avx2") == 0;
  if (baseline || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kBaseline;
  if (narrow || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  const bool without_pairs = limit && std::strcmp(limit, "avx512") == 0;
  return without_pairs || !__builtin_cpu_supports("avx512bf16") ? Isa::kAvx512 : Isa::kAvx512Bf16;
}

template <typename Body, typename... Args>
__attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(const Args&... args) {
  Body::run(args...);
}

template <typename Body, typename... Args>
__attribute__((noinline, target("avx2,fma"))) void run_avx2(const Args&... args) {
  Body::run(args...);
}

template <typename Body, typename... Args>
void run_vectorised(const Args&... args) {
  static const Isa isa = detect_isa();
  switch (isa) {
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return run_avx512<Body>(args...);
    case Isa::kAvx2:
      return run_avx2<Body>(args...);
    case Isa::kBaseline:
      return Body::run(args...);
  }
}

// Runs a body inside another one for the same vectors, but in a function of its own, so that what surrounds an inner
// loop takes none of its registers.
template <typename Width, typename Body, typename... Args>
DIFFGAP_HD void run_apart(const Args&... args) {
  if constexpr (Width::lanes == 16) {
    run_avx512<Body>(args...);
  } else if constexpr (Width::lanes == 8) {
    run_avx2<Body>(args...);
  } else {
    run_baseline<Body>(args...);
  }
}

template <typename Body, typename Width>
struct Blocked {
  template <typename... Args>
  static DIFFGAP_HD void run(const Args&... args) {
    Body::template run<Width>(args...);
  }
};

template <typename Body, typename... Args>
void run_blocked(const Args&... args) {
  static const Isa isa = detect_isa();
  switch (isa) {
    case Isa::kAvx512Bf16:
      return run_avx512<Blocked<Body, Vectors<16, true>>>(args...);
    case Isa::kAvx512:
      return run_avx512<Blocked<Body, Vectors<16>>>(args...);
    case Isa::kAvx2:
      return run_avx2<Blocked<Body, Vectors<8>>>(args...);
    case Isa::kBaseline:
      return Body::template run<Vectors<4>>(args...);
  }
}

// The same without bfloat16 pairs, for bodies that have no use for them.
template <typename Body, typename... Args>
void run_lanes(const Args&... args) {
  static const Isa isa = detect_isa();
  switch (isa) {
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return run_avx512<Blocked<Body, Vectors<16>>>(args...);
    case Isa::kAvx2:
      return run_avx2<Blocked<Body, Vectors<8>>>(args...);
    case Isa::kBaseline:
      return Body::template run<Vectors<4>>(args...);
  }
}

// The lanes that run_blocked and run_lanes have here.
inline int vector_lanes() {
  static const Isa isa = detect_isa();
  return isa == Isa::kBaseline ? 4 : isa == Isa::kAvx2 ? 8 : 16;
}

#else

template <typename Body, typename... Args>
void run_vectorised(const Args&... args) {
  Body::run(args...);
}

template <typename Width, typename Body, typename... Args>
DIFFGAP_HD void run_apart(const Args&... args) {
  run_baseline<Body>(args...);
}

template <typename Body, typename... Args>
void run_blocked(const Args&... args) {
  Body::template run<Vectors<4>>(args...);  // NEON's and SSE's width
}

template <typename Body, typename... Args>
void run_lanes(const Args&... args) {
  Body::template run<Vectors<4>>(args...);
}

inline int vector_lanes() { return 4; }

#endif

}  // namespace diffgap
