// Normals of a tile: Philox and Box-Muller, several counters at a time.
#pragma once

#include <cstdint>

#include "common/normal.h"
#include "common/philox.h"
#include "cpu/lanes.h"

namespace diffgap {

// Which noise a sample gets.
struct NoiseKey {
  uint64_t seed;
  uint32_t step, stream;
};

// Room for the normals of one tile, wherever it begins, and for the surplus of the last vectors.
struct NoiseBuffer {
  alignas(64) float values[kTile + 128];
};

// Philox on lanes / 2 counters, each in a 64-bit lane of its own: the multiplication of 32-bit words that has 64-bit
// results reads the low halves of such lanes, and nothing here minds what stands in the high ones.
template <int lanes>
struct PhiloxLanes {
  typedef uint64_t Wide __attribute__((vector_size(4 * lanes)));
  using Floats = Values<lanes>;
  using Words32 = typename Lanewise<Floats>::Unsigned;

  static DIFFGAP_HD Wide multiply(Wide a, Wide b) {
    Wide product;
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
    return product;
  }

  Wide c0, c1, c2, c3;

  DIFFGAP_HD void round(uint32_t key0, uint32_t key1) {
    const Wide product0 = multiply(c0, Wide{} + kPhiloxMultiplier0), product1 = multiply(c2, Wide{} + kPhiloxMultiplier1);
    c0 = (product1 >> 32) ^ c1 ^ (Wide{} + key0);
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ (Wide{} + key1);
    c3 = product0;
  }

  // The low halves of `even`, each followed by that of `odd`.
  static DIFFGAP_HD Words32 interleave_low(Wide even, Wide odd) {
    return reinterpret_cast<Words32>((even & 0xFFFFFFFFu) | (odd << 32));
  }
};

// 2 * lanes normals of each of kSets groups of counters that follow one another from `block` on.
template <int lanes, int kSets>
DIFFGAP_HD void draw_blocks(const NoiseKey& key, uint64_t block, float* values) {
  using Philox = PhiloxLanes<lanes>;
  using Wide = typename Philox::Wide;
  using Floats = typename Philox::Floats;
  Wide order;
  for (int i = 0; i < lanes / 2; ++i) order[i] = i;
  Philox state[kSets];
  for (int set = 0; set < kSets; ++set) {
    const Wide counter = order + (block + set * (lanes / 2));
    state[set] = {counter, counter >> 32, Wide{} + key.step, Wide{} + key.stream};
  }
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  for (int i = 0; i < kPhiloxRounds; ++i) {
    for (int set = 0; set < kSets; ++set) state[set].round(key0, key1);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  typename Lanewise<Floats>::Int front, back;  // of the lanes of cosines and sines in turn
  for (int i = 0; i < lanes; ++i) {
    front[i] = i / 2 + i % 2 * lanes;
    back[i] = front[i] + lanes / 2;
  }
  for (int set = 0; set < kSets; ++set) {
    const Philox& s = state[set];
    const Normals<Floats> normals =
        box_muller<Floats>(Philox::interleave_low(s.c0, s.c2), Philox::interleave_low(s.c1, s.c3));
    float* target = values + set * 2 * lanes;
    store<lanes>(target, __builtin_shuffle(normals.n0, normals.n1, front));
    store<lanes>(target + lanes, __builtin_shuffle(normals.n0, normals.n1, back));
  }
}

// Elements [begin, begin + n) of a sample's noise, n <= kTile; returns the first.
template <int lanes>
DIFFGAP_HD const float* draw_tile(const NoiseKey& key, int64_t begin, int n, NoiseBuffer& buffer) {
  const uint64_t first = static_cast<uint64_t>(begin) / kLanes;
  const int skipped = static_cast<int>(begin % kLanes);
  const int count = skipped + n;
  if constexpr (lanes >= 8) {
    constexpr int kSets = lanes / 4;  // in turn, because each of its rounds waits for the one before
    for (int i = 0; i < count; i += 2 * lanes * kSets) {
      draw_blocks<lanes, kSets>(key, first + i / kLanes, buffer.values + i);
    }
  } else {
    // No fused multiply-add of vectors here, so one counter at a time.
    for (int i = 0; i < count; i += kLanes) {
      const Words words = sample_words(key.seed, first + i / kLanes, key.step, key.stream);
      const Normals<float> front = box_muller<float>(words.w0, words.w1);
      const Normals<float> back = box_muller<float>(words.w2, words.w3);
      const float four[kLanes] = {front.n0, front.n1, back.n0, back.n1};
      std::memcpy(buffer.values + i, four, sizeof(four));
    }
  }
  return buffer.values + skipped;
}

}  // namespace diffgap
