// diffgap::solver_step on the CPU; diffgap/ops/solver_step.py has the definition.
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/solver_math.h"
#include "common/step_arguments.h"
#include "cpu/isa.h"
#include "cpu/noise.h"
#include "cpu/tensor.h"

namespace diffgap {
namespace {

template <typename T>
struct StepArgs {
  TileGrid grid;
  int64_t row_length;  // of the rows put on the sphere of radius x0_norm; unused without
  const StepRow* rows;  // one per sample, or one for all
  const int64_t* steps;  // or null, then `step` for all
  uint32_t step;
  const int64_t* seeds;  // or null: no noise
  const T *sample, *output, *unconditional, *last_sample, *h1, *h2, *h3;  // all but the first two may be null
  Guidance guidance;
  float rescale;   // 0: none
  float* factors;  // one per sample: what the rescale multiplies the guided output by; null without
  float limit;     // of the clamp; infinite: none
  float x0_norm;   // 0: none
  T *next, *x0, *corrected;  // all but the first may be null

  DIFFGAP_HD const StepRow& row(int64_t sample_index) const { return steps ? rows[sample_index] : rows[0]; }
};

// What the elements of a sample have in common.
struct SampleStep {
  StepRow row;
  float factor;  // of the guided output
  float limit;
  NoiseKey noise;
  bool noisy;

  template <typename T>
  DIFFGAP_HD static SampleStep of(const StepArgs<T>& a, int64_t sample) {
    const StepRow& row = a.row(sample);
    const uint32_t step = a.steps ? static_cast<uint32_t>(a.steps[sample]) : a.step;
    const uint64_t seed = a.seeds ? static_cast<uint64_t>(a.seeds[sample]) : 0;
    const bool noisy = a.seeds && row.pred_noise != 0.0f;
    return {row, a.factors ? a.factors[sample] : 1.0f, a.limit, {seed, step, kStreamSolver}, noisy};
  }

  // Before it is put on the sphere.
  template <typename Float>
  DIFFGAP_HD Float x0(Float sample, Float output) const {
    return clamp(row.x0_sample * sample + row.x0_output * output, limit);
  }
};

template <int lanes, typename T>
DIFFGAP_HD Lanes<lanes> load_or_zero(const T* source, int64_t at) {
  return source ? load<lanes>(source + at) : Lanes<lanes>{};
}

// The denoiser's output with guidance, before the rescale.
template <int lanes, typename T>
DIFFGAP_HD Lanes<lanes> guided(const StepArgs<T>& a, int64_t at) {
  const Lanes<lanes> conditional = load<lanes>(a.output + at);
  return a.unconditional ? guide(a.guidance, conditional, load<lanes>(a.unconditional + at)) : conditional;
}

// Loops are compiled for each combination of terms.
template <int history, bool corrects, bool noisy>
struct StepElements {
  // The table's row applied to `lanes` elements. Everything is read before anything is written: results may be
  // arguments.
  template <int lanes, typename T>
  static DIFFGAP_HD void apply(const StepArgs<T>& a, const SampleStep& s, float sphere, const float* noise,
                               int64_t at) {
    using Floats = Values<lanes>;
    const Floats sample = load<lanes>(a.sample + at);
    const Floats output = guided<lanes>(a, at) * s.factor;
    StepTerms<Floats> v{sample, output, s.x0(sample, output) * sphere, {}, {}, {}, {}, {}};
    if constexpr (history > 0) v.h1 = load_or_zero<lanes>(a.h1, at);
    if constexpr (history > 1) v.h2 = load_or_zero<lanes>(a.h2, at);
    if constexpr (history > 2) v.h3 = load_or_zero<lanes>(a.h3, at);
    if constexpr (noisy) v.noise = load<lanes>(noise);
    Floats corrected = sample;
    if constexpr (corrects) {
      v.last = load<lanes>(a.last_sample + at);
      corrected = correct<history>(s.row, v);
    }
    store<lanes>(a.next + at, advance<history, noisy>(s.row, v, corrected));
    if (a.x0) store<lanes>(a.x0 + at, v.x0);
    if (corrects && a.corrected) store<lanes>(a.corrected + at, corrected);
  }

  // n elements from `at` on.
  template <typename Width, typename T>
  static DIFFGAP_HD void run(const StepArgs<T>& args, const SampleStep& common, float sphere, const float* noise,
                             int64_t at, int n) {
    constexpr int lanes = Width::lanes;
    // Copies, which no result can overwrite, so that they need not be read again after each.
    const StepArgs<T> a = args;
    const SampleStep s = common;
    int i = 0;
    for (; i + lanes <= n; i += lanes) apply<lanes>(a, s, sphere, noise + i, at + i);
    for (; i < n; ++i) apply<1>(a, s, sphere, noise + i, at + i);
  }
};

template <typename T>
using StepLoop = void (*)(const StepArgs<T>&, const SampleStep&, float sphere, const float* noise, int64_t at, int n);

template <typename Width, typename T, size_t... i>
constexpr std::array<StepLoop<T>, sizeof...(i)> step_loops(std::index_sequence<i...>) {
  return {[](const StepArgs<T>& a, const SampleStep& s, float sphere, const float* noise, int64_t at, int n) {
    run_apart<Width, Blocked<StepElements<i / 4, i / 2 % 2 != 0, i % 2 != 0>, Width>>(a, s, sphere, noise, at, n);
  }...};
}

// The step of n elements of a sample from `begin` on, n <= kTile.
template <typename Width, typename T>
DIFFGAP_HD void step_tile(const StepArgs<T>& a, const SampleStep& s, float sphere, int64_t offset, int64_t begin, int n,
                          NoiseBuffer& buffer) {
  static constexpr auto loops = step_loops<Width, T>(std::make_index_sequence<16>());
  const float* noise = s.noisy ? draw_tile<Width::lanes>(s.noise, begin, n, buffer) : buffer.values;
  const int history = a.h3 ? 3 : a.h2 ? 2 : a.h1 ? 1 : 0;
  loops[4 * history + (a.last_sample ? 2 : 0) + (s.noisy ? 1 : 0)](a, s, sphere, noise, offset + begin, n);
}

struct StepTiles {
  template <typename Width, typename T>
  static DIFFGAP_HD void run(const StepArgs<T>& a, int64_t first, int64_t last) {
    NoiseBuffer buffer;
    for (int64_t tile = first; tile < last;) {
      const int64_t sample = a.grid.sample(tile);
      const SampleStep s = SampleStep::of(a, sample);
      const int64_t end = std::min(last, (sample + 1) * a.grid.per_sample());
      for (int64_t begin = a.grid.begin(tile); tile < end; ++tile, begin += kTile) {
        step_tile<Width>(a, s, 1.0f, sample * a.grid.count, begin, a.grid.width(begin), buffer);
      }
    }
  }
};

// Sum of the squares of x0 over [begin, end).
template <int lanes, typename T>
DIFFGAP_HD double x0_squares(const StepArgs<T>& a, const SampleStep& s, int64_t begin, int64_t end) {
  double total = 0.0;
  for (int64_t i = begin; i < end;) {
    const int64_t tile_end = std::min<int64_t>(end, i + kTile);
    Lanes<lanes> sums = {};
    for (; i + lanes <= tile_end; i += lanes) {
      const Lanes<lanes> x0 = s.x0(load<lanes>(a.sample + i), guided<lanes>(a, i) * s.factor);
      sums += x0 * x0;
    }
    total += sum_lanes<lanes>(sums);
    for (; i < tile_end; ++i) {
      const float x0 = s.x0(load<1>(a.sample + i), guided<1>(a, i) * s.factor);
      total += x0 * x0;
    }
  }
  return total;
}

// Rows that are put on the sphere: their length first, then their step.
struct StepRows {
  template <typename Width, typename T>
  static DIFFGAP_HD void run(const StepArgs<T>& a, int64_t first, int64_t last) {
    NoiseBuffer buffer;
    const int64_t per_sample = a.grid.count / a.row_length;
    for (int64_t row = first; row < last; ++row) {
      const int64_t sample = row / per_sample, offset = sample * a.grid.count;
      const int64_t begin = row % per_sample * a.row_length, end = begin + a.row_length;
      const SampleStep s = SampleStep::of(a, sample);
      const double squares = x0_squares<Width::lanes>(a, s, offset + begin, offset + end);
      const float sphere = squares > 0.0 ? static_cast<float>(a.x0_norm / std::sqrt(squares)) : 1.0f;
      for (int64_t i = begin; i < end; i += kTile) {
        const int n = static_cast<int>(std::min<int64_t>(end - i, kTile));
        step_tile<Width>(a, s, sphere, offset, i, n, buffer);
      }
    }
  }
};

// Sums over a sample of the conditional and the guided outputs less their shifts, or of the squares of that.
struct OutputSums {
  double conditional, guided;
};

template <int lanes, typename T>
DIFFGAP_HD OutputSums output_sums(const StepArgs<T>& a, int64_t begin, int64_t end, float conditional_shift,
                                  float guided_shift, bool squared) {
  OutputSums total{0.0, 0.0};
  for (int64_t i = begin; i < end;) {
    const int64_t tile_end = std::min<int64_t>(end, i + kTile);
    Lanes<lanes> conditional = {}, output = {};
    for (; i + lanes <= tile_end; i += lanes) {
      const Lanes<lanes> x = load<lanes>(a.output + i) - conditional_shift, y = guided<lanes>(a, i) - guided_shift;
      conditional += squared ? x * x : x;
      output += squared ? y * y : y;
    }
    total.conditional += sum_lanes<lanes>(conditional);
    total.guided += sum_lanes<lanes>(output);
    for (; i < tile_end; ++i) {
      const float x = load<1>(a.output + i) - conditional_shift, y = guided<1>(a, i) - guided_shift;
      total.conditional += squared ? x * x : x;
      total.guided += squared ? y * y : y;
    }
  }
  return total;
}

// The factor of guidance_rescale, from the standard deviations over each sample.
struct RescaleFactors {
  template <typename Width, typename T>
  static DIFFGAP_HD void run(const StepArgs<T>& a, int64_t first, int64_t last) {
    const int64_t count = a.grid.count;
    for (int64_t sample = first; sample < last; ++sample) {
      const int64_t begin = sample * count, end = begin + count;
      const OutputSums sums = output_sums<Width::lanes>(a, begin, end, 0.0f, 0.0f, false);
      const OutputSums squares =
          output_sums<Width::lanes>(a, begin, end, static_cast<float>(sums.conditional / count),
                                    static_cast<float>(sums.guided / count), true);
      const double ratio = squares.guided > 0.0 ? std::sqrt(squares.conditional / squares.guided) : 1.0;
      a.factors[sample] = static_cast<float>(a.rescale * ratio + (1.0 - a.rescale));
    }
  }
};

template <typename Coefficient>
StepRow step_row(const Tensor& table, int64_t row) {
  const Coefficient* coefficients = data_of<Coefficient>(table) + row * kStepColumns;
  float values[kStepColumns];
  for (int i = 0; i < kStepColumns; ++i) values[i] = static_cast<float>(coefficients[i]);
  StepRow result;
  memcpy(&result, values, sizeof(result));
  return result;
}

// A row that needs a term which is not there.
void check_terms(const StepRow& c, const StepArguments& a) {
  const auto check = [](const char* name, bool present, bool needed) {
    STD_TORCH_CHECK(present || !needed, name, ": not given, but the table's row needs it");
  };
  check("last_sample", a.last_sample.has_value(), c.corr_last != 0.0f);
  check("h1", a.h1.has_value(), c.corr_h1 != 0.0f || c.pred_h1 != 0.0f);
  check("h2", a.h2.has_value(), c.corr_h2 != 0.0f || c.pred_h2 != 0.0f);
  check("h3", a.h3.has_value(), c.corr_h3 != 0.0f || c.pred_h3 != 0.0f);
  check("seed", a.seed.has_value(), c.pred_noise != 0.0f);
}

void solver_step(const StepArguments& a, const StepResults& results) {
  const TileGrid grid{a.samples(), elements_per_sample(a.sample)};
  const auto packed = [](const std::optional<Tensor>& x) { return x ? std::optional(dense(*x)) : std::nullopt; };
  const std::optional<Tensor> steps = packed(a.steps), seeds = packed(a.seed);
  const int64_t* own_steps = data_or_null<int64_t>(steps);
  const auto row_of = a.table.scalar_type() == ScalarType::Double ? step_row<double> : step_row<float>;
  std::vector<StepRow> rows(steps ? grid.samples : 1);
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t row = own_steps ? own_steps[i] : a.step;
    check_row("step", row, a.table.size(0));
    rows[i] = row_of(a.table, row);
    check_terms(rows[i], a);
  }
  std::vector<float> factors(a.rescaled() ? grid.samples : 0);

  for_dtype(a.sample.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto result = [](const std::optional<Tensor>& x) { return x ? mutable_data_of<T>(*x) : nullptr; };
    const StepArgs<T> args{grid,
                           a.sample.size(a.sample.dim() - 1),
                           rows.data(),
                           own_steps,
                           static_cast<uint32_t>(a.step),
                           data_or_null<int64_t>(seeds),
                           data_of<T>(a.sample),
                           data_of<T>(a.output),
                           data_or_null<T>(a.unconditional),
                           data_or_null<T>(a.last_sample),
                           data_or_null<T>(a.h1),
                           data_or_null<T>(a.h2),
                           data_or_null<T>(a.h3),
                           a.guidance(),
                           static_cast<float>(a.guidance_rescale),
                           a.rescaled() ? factors.data() : nullptr,
                           static_cast<float>(a.x0_clamp.value_or(INFINITY)),
                           static_cast<float>(a.x0_norm.value_or(0.0)),
                           mutable_data_of<T>(results.next),
                           result(results.x0),
                           result(results.corrected)};
    if (grid.size() == 0) return;
    if (a.rescaled()) {
      const int64_t grain = 1 + kTilesPerThread / grid.per_sample();
      torch::stable::parallel_for(0, grid.samples, grain, [&](int64_t first, int64_t end) {
        run_lanes<RescaleFactors>(args, first, end);
      });
    }
    if (a.x0_norm) {
      const int64_t all = grid.samples * (grid.count / args.row_length);
      const int64_t grain = 1 + kTilesPerThread * kTile / args.row_length;
      torch::stable::parallel_for(0, all, grain,
                                  [&](int64_t first, int64_t end) { run_lanes<StepRows>(args, first, end); });
    } else {
      torch::stable::parallel_for(0, grid.size(), kTilesPerThread,
                                  [&](int64_t first, int64_t end) { run_lanes<StepTiles>(args, first, end); });
    }
  });
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) {
  using Op = diffgap::SolverStep<diffgap::solver_step>;
  m.impl("solver_step", TORCH_BOX(&Op::functional));
  m.impl("solver_step_out", TORCH_BOX(&Op::out));
}
