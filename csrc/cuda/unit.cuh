// A thread works on units: as many elements of a sample as 16 bytes hold, counted from the sample's first element.
#pragma once

#include "common/elements.h"
#include "cuda/device.cuh"

#if !defined(__CUDACC__)
#include "cpu/tile.h"
#endif

namespace diffgap {

#if defined(__CUDACC__)
DIFFGAP_DEVICE float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
DIFFGAP_DEVICE float widen(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
DIFFGAP_DEVICE void narrow(float value, Half* result) { result->bits = __half_as_ushort(__float2half_rn(value)); }
DIFFGAP_DEVICE void narrow(float value, BFloat16* result) {
  result->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
#endif

DIFFGAP_DEVICE float widen(float value) { return value; }
DIFFGAP_DEVICE void narrow(float value, float* result) { *result = value; }

template <typename T>
constexpr int kUnit = static_cast<int>(16 / sizeof(T));

// Elements [low, high) of the unit that begins at `at` are there; the others belong to something else, or to nothing.
struct Place {
  int64_t at;
  int low, high;

  DIFFGAP_HD bool has(int i) const { return low <= i && i < high; }
};

// The elements of a unit as memory has them, in whole registers: a 16-bit number of its own would take one as well.
template <typename T>
struct Elements {
  static constexpr int kPerWord = static_cast<int>(sizeof(uint32_t) / sizeof(T));
  uint32_t words[4] = {};

  static DIFFGAP_DEVICE int shift(int i) { return i % kPerWord * static_cast<int>(8 * sizeof(T)); }

  DIFFGAP_DEVICE T get(int i) const {
    const uint32_t bits = words[i / kPerWord] >> shift(i);
    T value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // Once for every i.
  DIFFGAP_DEVICE void set(int i, T value) {
    uint32_t bits = 0;
    memcpy(&bits, &value, sizeof(value));
    words[i / kPerWord] |= bits << shift(i);
  }

  DIFFGAP_DEVICE float operator[](int i) const { return widen(get(i)); }
};

template <typename T>
DIFFGAP_DEVICE T narrowed(float x) {
  T value;
  narrow(x, &value);
  return value;
}

// One 16-byte access where kVector, for whole units at multiples of 16 bytes. Elements that are not there read 0.
template <bool kVector, typename T>
DIFFGAP_DEVICE Elements<T> load(const T* source, const Place& place) {
  Elements<T> x;
  if constexpr (kVector) {
    const uint4 bits = *reinterpret_cast<const uint4*>(source + place.at);
    memcpy(x.words, &bits, sizeof(bits));
  } else {
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) {
      if (place.has(i)) x.set(i, source[place.at + i]);
    }
  }
  return x;
}

template <bool kVector, typename T>
DIFFGAP_DEVICE Elements<T> load_or_zeros(const T* source, const Place& place) {
  return source ? load<kVector>(source, place) : Elements<T>{};
}

// Writes what is there, if there is a target.
template <bool kVector, typename T>
DIFFGAP_DEVICE void store(T* target, const Place& place, const Elements<T>& x) {
  if (!target) return;
  if constexpr (kVector) {
    uint4 bits;
    memcpy(&bits, x.words, sizeof(bits));
    *reinterpret_cast<uint4*>(target + place.at) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) {
      if (place.has(i)) target[place.at + i] = x.get(i);
    }
  }
}

// Consecutive elements of one sample, and the units that hold them.
template <typename T>
struct Span {
  int64_t sample_at;   // the sample's first element
  int64_t begin, end;  // within the sample

  static DIFFGAP_HD Span of_sample(int64_t sample, int64_t count) { return {sample * count, 0, count}; }

  DIFFGAP_HD int64_t first_unit() const { return begin / kUnit<T>; }
  DIFFGAP_HD int64_t end_unit() const { return (end + kUnit<T> - 1) / kUnit<T>; }

  DIFFGAP_HD Place place(int64_t unit) const {
    const int64_t first = unit * kUnit<T>;
    return {sample_at + first, first < begin ? static_cast<int>(begin - first) : 0,
            end - first < kUnit<T> ? static_cast<int>(end - first) : kUnit<T>};
  }
};

}  // namespace diffgap
