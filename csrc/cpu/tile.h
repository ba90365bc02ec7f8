// Element types, and the tiles that kernels walk over: small enough for the first-level cache.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "common/macros.h"
#include "common/normal.h"

namespace diffgap {

constexpr int kTile = 256;

DIFFGAP_HD float widen(Half value) {
  const int32_t magnitude = value.bits & 0x7FFF;
  // The exponent's bias is 112 more; infinity and NaN keep the largest. Subnormals are multiples of 2**-24.
  const int32_t moved = (magnitude << 13) + (magnitude >= 0x7C00 ? 224 << 23 : 112 << 23);
  const float number =
      magnitude < 0x0400 ? static_cast<float>(magnitude) * 0x1p-24f : bits_to_float(moved);
  return bits_to_float(float_to_bits(number) | (value.bits & 0x8000) << 16);
}

DIFFGAP_HD float widen(BFloat16 value) { return bits_to_float(static_cast<int32_t>(value.bits) << 16); }

DIFFGAP_HD void narrow(float value, Half* result) {
  const int32_t bits = float_to_bits(value);
  const int32_t magnitude = bits & 0x7FFFFFFF;
  // Subnormal: the sum's last place is 2**-24, so the addition rounds to the nearest even multiple.
  const int32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000;
  const int32_t normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
  int32_t rounded = magnitude < 0x38800000 ? small : normal;  // 2**-14
  rounded = magnitude >= 0x477FF000 ? 0x7C00 : rounded;       // 65520, the first that rounds to infinity
  rounded = magnitude > 0x7F800000 ? 0x7E00 : rounded;
  result->bits = static_cast<uint16_t>(rounded | ((bits >> 16) & 0x8000));
}

DIFFGAP_HD void narrow(float value, BFloat16* result) {
  const int32_t bits = float_to_bits(value);
  const int32_t rounded = static_cast<int32_t>(
      (static_cast<uint32_t>(bits) + 0x7FFF + ((static_cast<uint32_t>(bits) >> 16) & 1)) >> 16);
  const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  result->bits = static_cast<uint16_t>(is_nan ? 0x7FC0 : rounded);
}

// A sample's elements in tiles, over all samples: what parallel_for counts.
struct TileGrid {
  int64_t samples, count;  // count: elements per sample

  DIFFGAP_HD int64_t per_sample() const { return (count + kTile - 1) / kTile; }
  DIFFGAP_HD int64_t size() const { return samples * per_sample(); }
  DIFFGAP_HD int64_t sample(int64_t tile) const { return tile / per_sample(); }
  DIFFGAP_HD int64_t begin(int64_t tile) const { return tile % per_sample() * kTile; }
  DIFFGAP_HD int width(int64_t begin) const {
    return static_cast<int>(count - begin < kTile ? count - begin : kTile);
  }
};

// Tiles a thread must have to be worth waking.
constexpr int64_t kTilesPerThread = 32;

}  // namespace diffgap
