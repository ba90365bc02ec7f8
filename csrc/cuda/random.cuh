// Device code of diffgap::normal; diffgap/ops/random.py has the definition.
#pragma once

#include "cuda/arguments.cuh"
#include "cuda/launch.cuh"
#include "cuda/noise.cuh"

namespace diffgap {

struct NormalArgs {
  int64_t samples, count;  // count: elements per sample
  Index seeds, steps;      // without steps.data `step` for all
  uint32_t step, stream;
  float* out;
};

template <bool kVector>
__global__ void __launch_bounds__(kThreads) normal_kernel(const __grid_constant__ NormalArgs a) {
  const int64_t sample = team_index();
  if (sample >= a.samples) return;
  const uint32_t step = a.steps.data ? static_cast<uint32_t>(a.steps[sample]) : a.step;
  const NoiseSource source{static_cast<uint64_t>(a.seeds[sample]), step, a.stream};
  for_units(Span<float>::of_sample(sample, a.count), [&](int64_t unit, const Place& place) {
    float noise[kUnit<float>];
    draw_unit(source, unit, noise);
    Elements<float> drawn;
#pragma unroll
    for (int i = 0; i < kUnit<float>; ++i) drawn.set(i, noise[i]);
    store<kVector>(a.out, place, drawn);
  });
}

inline void launch_normal(const NormalArgs& a, void* stream, int threads = kThreads) {
  if (a.samples == 0 || a.count == 0) return;
  const bool vector = whole_units(a.count, {a.out});
  launch(vector ? normal_kernel<true> : normal_kernel<false>, layout<float>(a.samples, a.count, threads), stream, a);
}

}  // namespace diffgap
