// Vectors of float32, or a single one: loads and stores of any element type, and their sums.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"
#include "cpu/product.h"
#include "cpu/tile.h"

namespace diffgap {

template <int lanes>
struct LanesOf {
  using Floats = typename Registers<lanes>::Vector;
  typedef float Values __attribute__((vector_size(4 * lanes)));
  typedef int32_t Bits __attribute__((vector_size(4 * lanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * lanes), aligned(2), may_alias));
};
template <>
struct LanesOf<1> {
  using Floats = float;
  using Values = float;
};
// As they lie in memory, and as template arguments, which drop what is said of memory.
template <int lanes>
using Lanes = typename LanesOf<lanes>::Floats;
template <int lanes>
using Values = typename LanesOf<lanes>::Values;

// As widen(BFloat16) and widen(Half) in tile.h have it for one.
template <int lanes>
DIFFGAP_HD Lanes<lanes> widen_bits(typename LanesOf<lanes>::Bits bits, BFloat16) {
  return reinterpret_cast<Lanes<lanes>>(bits << 16);
}

template <int lanes>
DIFFGAP_HD Lanes<lanes> widen_bits(typename LanesOf<lanes>::Bits bits, Half) {
  using Bits = typename LanesOf<lanes>::Bits;
  using Floats = Lanes<lanes>;
  const Bits none = {}, magnitude = bits & 0x7FFF;
  const Bits moved = (magnitude << 13) + (magnitude >= 0x7C00 ? none + (224 << 23) : none + (112 << 23));
  const Floats small = __builtin_convertvector(magnitude, Floats) * 0x1p-24f;
  const Bits number = magnitude < 0x0400 ? reinterpret_cast<Bits>(small) : moved;
  return reinterpret_cast<Floats>(number | (bits & 0x8000) << 16);
}

// What compilers make two or more instructions of is written in assembly: 16 lanes are always AVX-512's.
template <int lanes>
DIFFGAP_HD typename LanesOf<lanes>::Bits to_32_bits(const typename LanesOf<lanes>::Halves& halves) {
  typename LanesOf<lanes>::Bits bits;
  if constexpr (lanes == 16) {
    asm("vpmovzxwd %1, %0" : "=v"(bits) : "m"(halves));
  } else {
    bits = __builtin_convertvector(halves, decltype(bits));
  }
  return bits;
}

template <int lanes>
DIFFGAP_HD typename LanesOf<lanes>::Halves to_16_bits(typename LanesOf<lanes>::Bits bits) {
  typename LanesOf<lanes>::Halves halves;
  if constexpr (lanes == 16) {
    asm("vpmovdw %1, %0" : "=v"(halves) : "v"(bits));
  } else {
    halves = __builtin_convertvector(bits, decltype(halves));
  }
  return halves;
}

template <int lanes, typename T>
DIFFGAP_HD Lanes<lanes> load(const T* source) {
  if constexpr (lanes == 1) {
    return widen(*source);
  } else if constexpr (std::is_same_v<T, float>) {
    return *reinterpret_cast<const Lanes<lanes>*>(source);
  } else {
    using Halves = typename LanesOf<lanes>::Halves;
    return widen_bits<lanes>(to_32_bits<lanes>(*reinterpret_cast<const Halves*>(source)), T{});
  }
}

// As narrow() in tile.h has it for one.
template <int lanes>
DIFFGAP_HD typename LanesOf<lanes>::Bits narrow_bits(typename LanesOf<lanes>::Bits bits, BFloat16) {
  using Bits = typename LanesOf<lanes>::Bits;
  typedef uint32_t Unsigned __attribute__((vector_size(4 * lanes)));  // which may wrap around
  const Bits none = {};
  const Unsigned wide = reinterpret_cast<Unsigned>(bits);
  const Bits rounded = reinterpret_cast<Bits>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? none + 0x7FC0 : rounded;
}

template <int lanes>
DIFFGAP_HD typename LanesOf<lanes>::Bits narrow_bits(typename LanesOf<lanes>::Bits bits, Half) {
  using Bits = typename LanesOf<lanes>::Bits;
  const Bits none = {}, magnitude = bits & 0x7FFFFFFF;
  const Bits small = reinterpret_cast<Bits>(reinterpret_cast<Lanes<lanes>>(magnitude) + 0.5f) - 0x3F000000;
  const Bits normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
  Bits rounded = magnitude < 0x38800000 ? small : normal;
  rounded = magnitude >= 0x477FF000 ? none + 0x7C00 : rounded;
  rounded = magnitude > 0x7F800000 ? none + 0x7E00 : rounded;
  return rounded | ((bits >> 16) & 0x8000);
}

template <int lanes, typename T>
DIFFGAP_HD void store(T* target, Lanes<lanes> value) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<Lanes<lanes>*>(target) = value;
  } else if constexpr (lanes == 1) {
    narrow(value, target);
  } else {
    using Halves = typename LanesOf<lanes>::Halves;
    const auto bits = narrow_bits<lanes>(reinterpret_cast<typename LanesOf<lanes>::Bits>(value), T{});
    *reinterpret_cast<Halves*>(target) = to_16_bits<lanes>(bits);
  }
}

template <int lanes>
DIFFGAP_HD float sum_lanes(Lanes<lanes> value) {
  if constexpr (lanes > 4) {
    Lanes<lanes / 2> halves[2];
    std::memcpy(halves, &value, sizeof(value));
    return sum_lanes<lanes / 2>(halves[0] + halves[1]);
  } else {
    return (value[0] + value[2]) + (value[1] + value[3]);
  }
}

// Calls `step.at<lanes>(i)` for all i < n: whole vectors, then the elements that remain.
template <int lanes, typename Step>
DIFFGAP_HD void for_each(const Step& step, int n) {
  int i = 0;
  for (; i + lanes <= n; i += lanes) step.template at<lanes>(i);
  for (; i < n; ++i) step.template at<1>(i);
}

}  // namespace diffgap
