// Kernels walk over tiles small enough for the first-level cache. A tile of float32 is read in place; one of
// a lower dtype is widened into a buffer, and results take the same way back.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/normal.h"
#include "common/philox.h"

namespace diffgap {

constexpr int kTile = 256;
// Blocks of four normals drawn together: the 32-bit lanes of the widest vector.
constexpr int kBlockGroup = 16;

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

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

// The tile at `source` as float32; `buffer` holds it where it must be widened.
DIFFGAP_HD const float* load_tile(const float* source, int, float*) { return source; }

template <typename T>
DIFFGAP_HD const float* load_tile(const T* __restrict source, int n, float* __restrict buffer) {
  for (int i = 0; i < n; ++i) buffer[i] = widen(source[i]);
  return buffer;
}

// Where to compute the tile that goes to `target`, and its way there.
DIFFGAP_HD float* open_tile(float* target, float*) { return target; }
DIFFGAP_HD void close_tile(float*, int, const float*) {}

template <typename T>
DIFFGAP_HD float* open_tile(T*, float* buffer) {
  return buffer;
}
template <typename T>
DIFFGAP_HD void close_tile(T* __restrict target, int n, const float* __restrict buffer) {
  for (int i = 0; i < n; ++i) narrow(buffer[i], target + i);
}

// Which noise a sample gets.
struct NoiseKey {
  uint64_t seed;
  uint32_t step, stream;
};

// Room for the normals of one tile wherever it begins.
struct NoiseBuffer {
  alignas(64) float values[kTile + kLanes * kBlockGroup];
};

// Draws elements [begin, begin + n) of a sample, n <= kTile; returns the first.
DIFFGAP_HD const float* draw_tile(NoiseKey key, int64_t begin, int n, NoiseBuffer& buffer) {
  const uint64_t first = static_cast<uint64_t>(begin) / kLanes;
  const int skipped = static_cast<int>(begin % kLanes);
  // Rounded up to whole vectors: the surplus costs less than a scalar remainder.
  const int groups = (skipped + n + kLanes * kBlockGroup - 1) / (kLanes * kBlockGroup);
  float* __restrict values = buffer.values;
  for (int i = 0; i < groups * kBlockGroup; ++i) {
    const Words words = sample_words(key.seed, first + i, key.step, key.stream);
    const Normals front = box_muller(words.w0, words.w1);
    const Normals back = box_muller(words.w2, words.w3);
    values[kLanes * i] = front.n0;
    values[kLanes * i + 1] = front.n1;
    values[kLanes * i + 2] = back.n0;
    values[kLanes * i + 3] = back.n1;
  }
  return values + skipped;
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
