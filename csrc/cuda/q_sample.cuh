// Device code of diffgap::q_sample and its backward; diffgap/ops/q_sample.py has the definition.
#pragma once

#include <cmath>

#include "common/noising_math.h"
#include "cuda/arguments.cuh"
#include "cuda/launch.cuh"
#include "cuda/noise.cuh"

namespace diffgap {

struct NoisingArgs {
  int64_t samples, count;  // count: elements per sample
  Index t;
  Table table;
  int64_t target;

  DIFFGAP_HD NoisingRow row(int64_t sample) const {
    const int64_t row = t[sample];
    if (!table.has(row)) return {NAN, NAN, NAN, NAN};
    return noising_row(table.at(row, 0), table.at(row, 1), target);
  }
};

template <typename T>
struct QSampleArgs {
  NoisingArgs noising;
  Index seeds;
  const T* x0;
  T *x_t, *target;
  T* noise;  // or null
};

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) q_sample_kernel(const __grid_constant__ QSampleArgs<T> a) {
  const int64_t sample = team_index();
  if (sample >= a.noising.samples) return;
  const NoiseSource source{static_cast<uint64_t>(a.seeds[sample]), 0, kStreamDraw};
  for_units(Span<T>::of_sample(sample, a.noising.count), [&](int64_t unit, const Place& place) {
    const Elements<T> x0 = load<kVector>(a.x0, place);
    float noise[kUnit<T>];
    draw_unit(source, unit, noise);
    const NoisingRow row = a.noising.row(sample);  // here, so that its latency overlaps that of x0
    Elements<T> x_t, target, kept;
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) {
      x_t.set(i, narrowed<T>(row.alpha * x0[i] + row.sigma * noise[i]));
      target.set(i, narrowed<T>(noising_target(row, x0[i], noise[i])));
      kept.set(i, narrowed<T>(noise[i]));
    }
    store<kVector>(a.x_t, place, x_t);
    store<kVector>(a.target, place, target);
    store<kVector>(a.noise, place, kept);
  });
}

template <typename T>
struct QSampleBackwardArgs {
  NoisingArgs noising;
  const T *grad_x_t, *grad_target;
  T* grad_x0;
};

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) q_sample_backward_kernel(const __grid_constant__ QSampleBackwardArgs<T> a) {
  const int64_t sample = team_index();
  if (sample >= a.noising.samples) return;
  for_units(Span<T>::of_sample(sample, a.noising.count), [&](int64_t, const Place& place) {
    const Elements<T> grad_x_t = load<kVector>(a.grad_x_t, place);
    const Elements<T> grad_target = load<kVector>(a.grad_target, place);
    const NoisingRow row = a.noising.row(sample);
    Elements<T> grad_x0;
#pragma unroll
    for (int i = 0; i < kUnit<T>; ++i) {
      grad_x0.set(i, narrowed<T>(row.alpha * grad_x_t[i] + row.clean * grad_target[i]));
    }
    store<kVector>(a.grad_x0, place, grad_x0);
  });
}

template <typename T>
void launch_q_sample(const QSampleArgs<T>& a, void* stream, int threads = kThreads) {
  const NoisingArgs& n = a.noising;
  if (n.samples == 0 || n.count == 0) return;
  const bool vector = whole_units(n.count, {a.x0, a.x_t, a.target, a.noise});
  launch(vector ? q_sample_kernel<T, true> : q_sample_kernel<T, false>, layout<T>(n.samples, n.count, threads), stream,
         a);
}

template <typename T>
void launch_q_sample_backward(const QSampleBackwardArgs<T>& a, void* stream, int threads = kThreads) {
  const NoisingArgs& n = a.noising;
  if (n.samples == 0 || n.count == 0) return;
  const bool vector = whole_units(n.count, {a.grad_x_t, a.grad_target, a.grad_x0});
  launch(vector ? q_sample_backward_kernel<T, true> : q_sample_backward_kernel<T, false>,
         layout<T>(n.samples, n.count, threads), stream, a);
}

}  // namespace diffgap
