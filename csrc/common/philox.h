// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// diffgap/ops/random.py defines how counters and keys are made; both sides must give the same bits.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace diffgap {

// Last word of the counter; the STREAM_* constants of diffgap/ops/random.py.
constexpr uint32_t kStreamDraw = 0;
constexpr uint32_t kStreamSolver = 1;

constexpr int kLanes = 4;  // Words, and normals, per counter.

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

struct Words {
  uint32_t w0, w1, w2, w3;
};

DIFFGAP_HD Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter.w0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter.w2;
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.w1 ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter.w3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return counter;
}

// The words of elements 4 * block to 4 * block + 3 of the sample with this seed.
DIFFGAP_HD Words sample_words(uint64_t seed, uint64_t block, uint32_t step, uint32_t stream) {
  return philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), step, stream},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace diffgap
