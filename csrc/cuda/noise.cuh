// Noise of a unit: a thread draws the Philox blocks of its own elements.
#pragma once

#include "common/normal.h"
#include "common/philox.h"
#include "cuda/unit.cuh"

namespace diffgap {

// Which noise a sample gets.
struct NoiseSource {
  uint64_t seed;
  uint32_t step, stream;
};

template <int kCount>
DIFFGAP_DEVICE void draw_unit(const NoiseSource& source, int64_t unit, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += kLanes) {
    const uint64_t block = static_cast<uint64_t>(unit) * (kCount / kLanes) + i / kLanes;
    const Words words = sample_words(source.seed, block, source.step, source.stream);
    const Normals<float> front = box_muller<float>(words.w0, words.w1);
    const Normals<float> back = box_muller<float>(words.w2, words.w3);
    x[i] = front.n0;
    x[i + 1] = front.n1;
    x[i + 2] = back.n0;
    x[i + 3] = back.n1;
  }
}

}  // namespace diffgap
