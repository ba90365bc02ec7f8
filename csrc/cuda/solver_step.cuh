// Device code of diffgap::solver_step; diffgap/ops/solver_step.py has the definition.
//
// Results may be the memory of arguments. An element is read and written by one thread alone, which reads all terms
// before it writes any result; so no pointer is __restrict__ and no load goes through the read-only cache.
#pragma once

#include <cmath>

#include "common/solver_math.h"
#include "cuda/arguments.cuh"
#include "cuda/launch.cuh"
#include "cuda/noise.cuh"
#include "cuda/team_sum.cuh"

namespace diffgap {

template <typename T>
struct StepArgs {
  int64_t samples, count;  // count: elements per sample
  int64_t row_length;      // of the rows put on the sphere of radius x0_norm; count without
  Table table;
  Index steps;  // without steps.data `step` for all
  int64_t step;
  Index seeds;  // without seeds.data no noise
  const T *sample, *output, *unconditional, *last, *h1, *h2, *h3;  // all but the first two may be null
  Guidance guidance;
  float rescale, limit, x0_norm;  // 0, infinite, 0: none
  T* next;
  T *x0, *corrected;  // or null
  // Of row_step_kernel, set by the launch: a team has one row, or with a rescale all rows of a sample.
  uint32_t teams_per_sample;
  int64_t rows_per_team;

  DIFFGAP_HD int64_t step_of(int64_t sample) const { return steps.data ? steps[sample] : step; }
};

// What a unit's step reads.
template <typename T>
struct Terms {
  Elements<T> sample, conditional, unconditional, last, h1, h2, h3;

  template <bool kVector>
  static DIFFGAP_DEVICE Terms read(const StepArgs<T>& a, const Place& place) {
    return {load<kVector>(a.sample, place),
            load<kVector>(a.output, place),
            load_or_zeros<kVector>(a.unconditional, place),
            load_or_zeros<kVector>(a.last, place),
            load_or_zeros<kVector>(a.h1, place),
            load_or_zeros<kVector>(a.h2, place),
            load_or_zeros<kVector>(a.h3, place)};
  }

  DIFFGAP_DEVICE float output(int i, const StepArgs<T>& a) const {
    return a.unconditional ? guide(a.guidance, conditional[i], unconditional[i]) : conditional[i];
  }

  // Before it is put on the sphere; `factor` is the guidance rescale's.
  DIFFGAP_DEVICE float x0(int i, const StepArgs<T>& a, const StepRow& c, float factor) const {
    return clamp(c.x0_sample * sample[i] + c.x0_output * (factor * output(i, a)), a.limit);
  }
};

// The coefficients of a block's teams in shared memory; team i's sample is sample_of(i). A barrier must follow.
template <typename T, typename SampleOf>
DIFFGAP_DEVICE void load_rows(const StepArgs<T>& a, StepRow* rows, const SampleOf& sample_of) {
  float* values = reinterpret_cast<float*>(rows);
  const unsigned threads = blockDim.x * blockDim.y;
  for (unsigned i = threadIdx.y * blockDim.x + threadIdx.x; i < blockDim.y * kStepColumns; i += threads) {
    const int64_t sample = sample_of(i / kStepColumns);
    if (sample >= a.samples) continue;
    const int64_t row = a.step_of(sample);
    values[i] = a.table.has(row) ? a.table.at(row, i % kStepColumns) : NAN;
  }
}

// The rest of a unit's step: `sphere` scales x0.
template <bool kVector, typename T>
DIFFGAP_DEVICE void finish(const StepArgs<T>& a, const StepRow& c, int64_t sample, int64_t unit, const Place& place,
                           const Terms<T>& terms, float factor, float sphere) {
  constexpr int n = kUnit<T>;
  float noise[n] = {};
  if (a.seeds.data && c.pred_noise != 0.0f) {
    const uint32_t step = static_cast<uint32_t>(a.step_of(sample));
    draw_unit({static_cast<uint64_t>(a.seeds[sample]), step, kStreamSolver}, unit, noise);
  }
  Elements<T> next, x0, corrected;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float clean = sphere * terms.x0(i, a, c, factor);
    const float output = factor * terms.output(i, a);
    const StepTerms<float> v{terms.sample[i], output,      clean,       terms.last[i],
                             terms.h1[i],     terms.h2[i], terms.h3[i], noise[i]};
    const float right = a.last ? correct(c, v) : v.sample;
    next.set(i, narrowed<T>(advance(c, v, right)));
    x0.set(i, narrowed<T>(clean));
    corrected.set(i, narrowed<T>(right));
  }
  store<kVector>(a.next, place, next);
  store<kVector>(a.x0, place, x0);
  store<kVector>(a.corrected, place, corrected);
}

// Without reductions: a thread for every unit.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ StepArgs<T> a) {
  __shared__ StepRow rows[kMaxTeams];
  const int64_t sample = team_index();
  const Span<T> span = Span<T>::of_sample(sample, sample < a.samples ? a.count : 0);
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x;
  int64_t unit = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  Terms<T> terms;
  // Before the barrier, so that the latencies of tensors and coefficients overlap.
  if (unit < span.end_unit()) terms = Terms<T>::template read<kVector>(a, span.place(unit));
  load_rows(a, rows, [&](unsigned team) { return static_cast<int64_t>(blockIdx.x) * blockDim.y + team; });
  __syncthreads();
  const StepRow& c = rows[threadIdx.y];
  while (unit < span.end_unit()) {
    finish<kVector>(a, c, sample, unit, span.place(unit), terms, 1.0f, 1.0f);
    unit += stride;
    if (unit < span.end_unit()) terms = Terms<T>::template read<kVector>(a, span.place(unit));
  }
}

// With reductions. Where kHeld, a thread has at most one unit and keeps it in registers; elsewhere every pass reads its
// units again.
template <typename T, bool kVector, bool kHeld>
struct RowStep {
  const StepArgs<T>& a;
  Terms<T> held;
  TeamSum team_sum;

  template <typename Body>
  DIFFGAP_DEVICE void for_units(const Span<T>& span, const Body& body) const {
    int64_t unit = span.first_unit() + threadIdx.x;
    if constexpr (kHeld) {
      if (unit < span.end_unit()) body(unit, span.place(unit), held);
    } else {
      for (; unit < span.end_unit(); unit += blockDim.x) {
        const Place place = span.place(unit);
        body(unit, place, Terms<T>::template read<kVector>(a, place));
      }
    }
  }

  template <typename Body>
  DIFFGAP_DEVICE void for_elements(const Span<T>& span, const Body& body) const {
    for_units(span, [&](int64_t, const Place& place, const Terms<T>& terms) {
#pragma unroll
      for (int i = 0; i < kUnit<T>; ++i) {
        if (kVector || place.has(i)) body(i, terms);
      }
    });
  }

  // phi * std(conditional) / std(output) + 1 - phi
  DIFFGAP_DEVICE float rescale_factor(const Span<T>& sample) {
    float means[2] = {};
    for_elements(sample, [&](int i, const Terms<T>& terms) {
      means[0] += terms.conditional[i];
      means[1] += terms.output(i, a);
    });
    team_sum(means);
    for (float& mean : means) mean /= static_cast<float>(a.count);
    float squares[2] = {};
    for_elements(sample, [&](int i, const Terms<T>& terms) {
      const float wanted = terms.conditional[i] - means[0], got = terms.output(i, a) - means[1];
      squares[0] += wanted * wanted;
      squares[1] += got * got;
    });
    team_sum(squares);
    const float ratio = squares[1] > 0.0f ? sqrtf(squares[0] / squares[1]) : 1.0f;
    return a.rescale * ratio + (1.0f - a.rescale);
  }

  // What puts a row of x0 on the sphere; rows of zeros stay.
  DIFFGAP_DEVICE float sphere_factor(const Span<T>& row, const StepRow& c, float factor) {
    float squares[1] = {};
    for_elements(row, [&](int i, const Terms<T>& terms) {
      const float x0 = terms.x0(i, a, c, factor);
      squares[0] += x0 * x0;
    });
    team_sum(squares);
    return squares[0] > 0.0f ? a.x0_norm / sqrtf(squares[0]) : 1.0f;
  }
};

template <typename T, bool kVector, bool kHeld>
__global__ void __launch_bounds__(kMaxRowThreads) row_step_kernel(const __grid_constant__ StepArgs<T> a) {
  __shared__ StepRow rows[kMaxTeams];
  const auto sample_of = [&](int64_t i) { return static_cast<int64_t>(static_cast<uint32_t>(i) / a.teams_per_sample); };
  const int64_t team = team_index(), sample = sample_of(team);
  const bool exists = sample < a.samples;
  const int64_t begin = (team - sample * a.teams_per_sample) * a.row_length;
  // `count` rows of the team's from `row` on; none of a team that the last block has too many.
  const auto span_of = [&](int64_t row, int64_t count) {
    const int64_t first = begin + row * a.row_length;
    return exists ? Span<T>{sample * a.count, first, first + count * a.row_length} : Span<T>{0, 0, 0};
  };

  RowStep<T, kVector, kHeld> step{a, {}, {}};
  if constexpr (kHeld) {
    const Span<T> span = span_of(0, 1);
    const int64_t unit = span.first_unit() + threadIdx.x;
    // Before the barrier, so that the latencies of tensors and coefficients overlap.
    if (unit < span.end_unit()) step.held = Terms<T>::template read<kVector>(a, span.place(unit));
  }
  load_rows(a, rows, [&](unsigned i) { return sample_of(static_cast<int64_t>(blockIdx.x) * blockDim.y + i); });
  __syncthreads();
  const StepRow& c = rows[threadIdx.y];

  const float factor = a.rescale != 0.0f ? step.rescale_factor(span_of(0, a.rows_per_team)) : 1.0f;
  for (int64_t row = 0; row < (kHeld ? 1 : a.rows_per_team); ++row) {
    const Span<T> span = span_of(row, 1);
    const float sphere = a.x0_norm != 0.0f ? step.sphere_factor(span, c, factor) : 1.0f;
    step.for_units(span, [&](int64_t unit, const Place& place, const Terms<T>& terms) {
      finish<kVector>(a, c, sample, unit, place, terms, factor, sphere);
    });
  }
}

template <typename T>
void launch_row_step(StepArgs<T> a, bool vector, void* stream, int threads) {
  const int64_t rows = a.count / a.row_length;
  a.rows_per_team = a.rescale != 0.0f ? rows : 1;
  a.teams_per_sample = static_cast<uint32_t>(rows / a.rows_per_team);
  const int64_t length = a.rows_per_team * a.row_length;
  // A row that begins inside of a unit may end inside of another.
  const int64_t units = length % kUnit<T> == 0 ? length / kUnit<T> : length / kUnit<T> + 2;
  // The width, and with it the order of sums, does not depend on the threads asked for.
  const unsigned width = team_width(units, kMaxRowThreads);
  const bool held = a.rows_per_team == 1 && units <= width;
  const Layout layout = team_layout(a.samples * a.teams_per_sample, width, 1, threads);
  if (held) {
    launch(vector ? row_step_kernel<T, true, true> : row_step_kernel<T, false, true>, layout, stream, a);
  } else {
    launch(vector ? row_step_kernel<T, true, false> : row_step_kernel<T, false, false>, layout, stream, a);
  }
}

template <typename T>
void launch_solver_step(const StepArgs<T>& a, void* stream, int threads = kThreads) {
  if (a.samples == 0 || a.count == 0) return;
  const bool vector = whole_units(a.row_length, {a.sample, a.output, a.unconditional, a.last, a.h1, a.h2, a.h3}) &&
                      whole_units<T>(a.row_length, {a.next, a.x0, a.corrected});
  if (a.rescale != 0.0f || a.x0_norm != 0.0f) return launch_row_step(a, vector, stream, threads);
  launch(vector ? step_kernel<T, true> : step_kernel<T, false>, layout<T>(a.samples, a.count, threads), stream, a);
}

}  // namespace diffgap
