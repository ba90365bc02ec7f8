// diffgap::solver_step on the CPU; diffgap/ops/solver_step.py has the definition.
#include <cmath>
#include <cstring>

#include "common/solver_math.h"
#include "cpu/isa.h"
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
  float clamp, x0_norm;  // 0: none
  T *next, *x0;
  T* corrected;  // or null: no corrector

  DIFFGAP_HD const StepRow& row(int64_t sample) const { return steps ? rows[sample] : rows[0]; }
};

// Buffers of one thread, all in the first-level cache. Absent terms read `zeros`.
struct Scratch {
  alignas(64) float zeros[kTile] = {};
  alignas(64) float sample[kTile], conditional[kTile], unconditional[kTile], output[kTile], x0[kTile];
  alignas(64) float last[kTile], h1[kTile], h2[kTile], h3[kTile];
  alignas(64) float next[kTile], next_x0[kTile], corrected[kTile];
  NoiseBuffer noise;
};

template <typename T>
DIFFGAP_HD const float* load_or_zeros(const T* source, int64_t at, int n, float* buffer, const Scratch& s) {
  return source ? load_tile(source + at, n, buffer) : s.zeros;
}

// A tile of the denoiser's output as it is, and guided (before the rescale); the same without guidance.
struct GuidedTile {
  const float *conditional, *output;
};

template <typename T>
DIFFGAP_HD GuidedTile guide_tile(const StepArgs<T>& a, int64_t at, int n, Scratch& s) {
  const float* __restrict conditional = load_tile(a.output + at, n, s.conditional);
  if (!a.unconditional) return {conditional, conditional};
  const float* __restrict unconditional = load_tile(a.unconditional + at, n, s.unconditional);
  float* __restrict output = s.output;
  const Guidance guidance = a.guidance;
  for (int i = 0; i < n; ++i) output[i] = guide(guidance, conditional[i], unconditional[i]);
  return {conditional, output};
}

// From the elements of a sample to those of x0, before it is put on the sphere.
struct Prediction {
  float from_sample, from_output;
  float factor;  // of the guided output
  float limit;   // infinite: no clamp

  template <typename T>
  DIFFGAP_HD static Prediction of(const StepArgs<T>& a, int64_t sample) {
    const StepRow& c = a.row(sample);
    const float factor = a.factors ? a.factors[sample] : 1.0f;
    return {c.x0_sample, c.x0_output, factor, a.clamp > 0.0f ? a.clamp : INFINITY};
  }

  DIFFGAP_HD float x0(float sample, float output) const {
    const float x = from_sample * sample + from_output * output;
    // Written so that NaN stays NaN.
    const float above = x < -limit ? -limit : x;
    return above > limit ? limit : above;
  }
};

// Sum over a tile of (x - shift)**power, power 1 or 2, in a fixed order.
DIFFGAP_HD double sum_tile(const float* __restrict x, int n, float shift, bool squared) {
  constexpr int kWidth = 16;
  float lanes[kWidth] = {};
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    for (int j = 0; j < kWidth; ++j) {
      const float d = x[i + j] - shift;
      lanes[j] += squared ? d * d : d;
    }
  }
  double total = 0.0;
  for (int j = 0; j < kWidth; ++j) total += lanes[j];
  for (; i < n; ++i) {
    const float d = x[i] - shift;
    total += squared ? d * d : d;
  }
  return total;
}

// x0 of a tile into s.x0, before it is put on the sphere.
template <typename T>
DIFFGAP_HD void predict_tile(const StepArgs<T>& a, int64_t sample, int64_t at, int n, Scratch& s) {
  const Prediction p = Prediction::of(a, sample);
  const float* __restrict current = load_tile(a.sample + at, n, s.sample);
  const float* __restrict output = guide_tile(a, at, n, s).output;
  float* __restrict x0 = s.x0;
  for (int i = 0; i < n; ++i) x0[i] = p.x0(current[i], output[i] * p.factor);
}

// What a tile's step reads; StepTerms has the elements.
struct TileTerms {
  const float *sample, *output, *last, *h1, *h2, *h3, *noise;
};

// The table's row applied to a tile. The results are parameters because GCC believes __restrict only there:
// of local pointers it tests every result against every term for overlap, and leaves the loop scalar where
// that makes too many tests.
template <bool kCorrects>
DIFFGAP_HD void combine_tile(const StepRow& row, const Prediction& prediction, float sphere,
                             const TileTerms& terms, int n, float* __restrict next, float* __restrict x0,
                             float* __restrict corrected) {
  const StepRow c = row;
  const Prediction p = prediction;
  const TileTerms t = terms;
  for (int i = 0; i < n; ++i) {
    const float output = t.output[i] * p.factor;
    const float clean = p.x0(t.sample[i], output) * sphere;
    StepTerms v{t.sample[i], output, clean, 0.0f, t.h1[i], t.h2[i], t.h3[i], t.noise[i]};
    if constexpr (kCorrects) {
      v.last = t.last[i];
      corrected[i] = correct(c, v);
    }
    next[i] = advance(c, v, kCorrects ? corrected[i] : v.sample);
    x0[i] = clean;
  }
}

// The step of one tile; x0 is scaled by `sphere`.
template <typename T>
DIFFGAP_HD void finish_tile(const StepArgs<T>& a, int64_t sample, int64_t begin, int n, float sphere,
                            Scratch& s) {
  const int64_t at = sample * a.grid.count + begin;
  const Prediction prediction = Prediction::of(a, sample);
  TileTerms terms{load_tile(a.sample + at, n, s.sample),
                  guide_tile(a, at, n, s).output,
                  load_or_zeros(a.last_sample, at, n, s.last, s),
                  load_or_zeros(a.h1, at, n, s.h1, s),
                  load_or_zeros(a.h2, at, n, s.h2, s),
                  load_or_zeros(a.h3, at, n, s.h3, s),
                  s.zeros};
  const StepRow& c = a.row(sample);
  if (a.seeds && c.pred_noise != 0.0f) {
    const uint32_t step = a.steps ? static_cast<uint32_t>(a.steps[sample]) : a.step;
    terms.noise = draw_tile({static_cast<uint64_t>(a.seeds[sample]), step, kStreamSolver}, begin, n, s.noise);
  }
  float* next = open_tile(a.next + at, s.next);
  float* x0 = open_tile(a.x0 + at, s.next_x0);
  if (a.corrected) {
    float* corrected = open_tile(a.corrected + at, s.corrected);
    combine_tile<true>(c, prediction, sphere, terms, n, next, x0, corrected);
    close_tile(a.corrected + at, n, corrected);
  } else {
    combine_tile<false>(c, prediction, sphere, terms, n, next, x0, nullptr);
  }
  close_tile(a.next + at, n, next);
  close_tile(a.x0 + at, n, x0);
}

struct StepTiles {
  template <typename T>
  static DIFFGAP_HD void run(const StepArgs<T>& a, int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = a.grid.begin(tile);
      finish_tile(a, a.grid.sample(tile), begin, a.grid.width(begin), 1.0f, scratch);
    }
  }
};

// Rows that are put on the sphere: their length first, then their step.
struct StepRows {
  template <typename T>
  static DIFFGAP_HD void run(const StepArgs<T>& a, int64_t first, int64_t last) {
    Scratch scratch;
    const int64_t per_sample = a.grid.count / a.row_length;
    for (int64_t row = first; row < last; ++row) {
      const int64_t sample = row / per_sample, begin = row % per_sample * a.row_length;
      const int64_t end = begin + a.row_length;
      double squares = 0.0;
      for (int64_t i = begin; i < end; i += kTile) {
        const int n = static_cast<int>(end - i < kTile ? end - i : kTile);
        predict_tile(a, sample, sample * a.grid.count + i, n, scratch);
        squares += sum_tile(scratch.x0, n, 0.0f, true);
      }
      const float sphere = squares > 0.0 ? static_cast<float>(a.x0_norm / std::sqrt(squares)) : 1.0f;
      for (int64_t i = begin; i < end; i += kTile) {
        const int n = static_cast<int>(end - i < kTile ? end - i : kTile);
        finish_tile(a, sample, i, n, sphere, scratch);
      }
    }
  }
};

// The factor of guidance_rescale, from the standard deviations over each sample.
struct RescaleFactors {
  template <typename T>
  static DIFFGAP_HD void run(const StepArgs<T>& a, int64_t first, int64_t last) {
    Scratch s;
    const int64_t count = a.grid.count;
    for (int64_t sample = first; sample < last; ++sample) {
      double wanted = 0.0, got = 0.0;
      float wanted_mean = 0.0f, got_mean = 0.0f;
      for (const bool squared : {false, true}) {
        wanted = got = 0.0;
        for (int64_t begin = 0; begin < count; begin += kTile) {
          const int n = a.grid.width(begin);
          const GuidedTile tile = guide_tile(a, sample * count + begin, n, s);
          wanted += sum_tile(tile.conditional, n, wanted_mean, squared);
          got += sum_tile(tile.output, n, got_mean, squared);
        }
        if (!squared) {
          wanted_mean = static_cast<float>(wanted / count);
          got_mean = static_cast<float>(got / count);
        }
      }
      const double ratio = got > 0.0 ? std::sqrt(wanted / got) : 1.0;
      a.factors[sample] = static_cast<float>(a.rescale * ratio + (1.0 - a.rescale));
    }
  }
};

StepRow step_row(const double* coefficients) {
  float values[kStepColumns];
  for (int i = 0; i < kStepColumns; ++i) values[i] = static_cast<float>(coefficients[i]);
  StepRow row;
  memcpy(&row, values, sizeof(row));
  return row;
}

// The same shape and dtype as the sample, contiguous; absent stays absent.
std::optional<Tensor> term_of(const char* name, const std::optional<Tensor>& x, const Tensor& sample) {
  if (!x) return std::nullopt;
  STD_TORCH_CHECK(x->numel() == sample.numel() && x->scalar_type() == sample.scalar_type(), name,
                  ": expected the sample's shape and dtype");
  return torch::stable::contiguous(*x);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x ? data_of<T>(*x) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> solver_step(
    const Tensor& sample_in, const Tensor& output_in, const Tensor& table,
    const std::optional<Tensor>& steps_in, int64_t step, const std::optional<Tensor>& unconditional_in,
    double guidance_scale, bool offset_form, double guidance_rescale, const std::optional<Tensor>& last_in,
    const std::optional<Tensor>& h1_in, const std::optional<Tensor>& h2_in,
    const std::optional<Tensor>& h3_in, const std::optional<Tensor>& seed_in,
    const std::optional<double>& x0_clamp, const std::optional<double>& x0_norm) {
  const Tensor sample = torch::stable::contiguous(sample_in);
  const TileGrid grid{sample.size(0), elements_per_sample(sample)};
  const std::optional<Tensor> output = term_of("output", output_in, sample);
  const std::optional<Tensor> unconditional = term_of("unconditional", unconditional_in, sample);
  const std::optional<Tensor> last = term_of("last_sample", last_in, sample);
  const std::optional<Tensor> h1 = term_of("h1", h1_in, sample), h2 = term_of("h2", h2_in, sample);
  const std::optional<Tensor> h3 = term_of("h3", h3_in, sample);
  const std::optional<Tensor> seeds =
      seed_in ? std::optional(index_of("seed", *seed_in, grid.samples)) : std::nullopt;
  const std::optional<Tensor> steps =
      steps_in ? std::optional(index_of("steps", *steps_in, grid.samples)) : std::nullopt;

  const Tensor wide = table_of(table, kStepColumns);
  const int64_t* own_steps = data_or_null<int64_t>(steps);
  std::vector<StepRow> rows(steps ? grid.samples : 1);
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t row = own_steps ? own_steps[i] : step;
    check_row("step", row, wide.size(0));
    rows[i] = step_row(data_of<double>(wide) + row * kStepColumns);
  }
  const bool rescaled = unconditional && guidance_rescale != 0.0;
  std::vector<float> factors(rescaled ? grid.samples : 0);
  const Tensor next = torch::stable::empty_like(sample), x0 = torch::stable::empty_like(sample);
  const Tensor corrected =
      last ? torch::stable::empty_like(sample) : empty_of(sample, {0}, sample.scalar_type());
  if (grid.size() == 0) return {next, x0, corrected};

  for_dtype(sample.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const StepArgs<T> args{grid,
                           sample.size(sample.dim() - 1),
                           rows.data(),
                           own_steps,
                           static_cast<uint32_t>(step),
                           data_or_null<int64_t>(seeds),
                           data_of<T>(sample),
                           data_of<T>(*output),
                           data_or_null<T>(unconditional),
                           data_or_null<T>(last),
                           data_or_null<T>(h1),
                           data_or_null<T>(h2),
                           data_or_null<T>(h3),
                           {static_cast<float>(guidance_scale), offset_form},
                           static_cast<float>(guidance_rescale),
                           rescaled ? factors.data() : nullptr,
                           static_cast<float>(x0_clamp.value_or(0.0)),
                           static_cast<float>(x0_norm.value_or(0.0)),
                           mutable_data_of<T>(next),
                           mutable_data_of<T>(x0),
                           last ? mutable_data_of<T>(corrected) : nullptr};
    if (rescaled) {
      const int64_t grain = 1 + kTilesPerThread / grid.per_sample();
      torch::stable::parallel_for(0, grid.samples, grain, [&](int64_t first, int64_t end) {
        run_vectorised<RescaleFactors>(args, first, end);
      });
    }
    if (x0_norm) {
      const int64_t all = grid.samples * (grid.count / args.row_length);
      const int64_t grain = 1 + kTilesPerThread * kTile / args.row_length;
      torch::stable::parallel_for(0, all, grain, [&](int64_t first, int64_t end) {
        run_vectorised<StepRows>(args, first, end);
      });
    } else {
      torch::stable::parallel_for(0, grid.size(), kTilesPerThread, [&](int64_t first, int64_t end) {
        run_vectorised<StepTiles>(args, first, end);
      });
    }
  });
  return {next, x0, corrected};
}

}  // namespace
}  // namespace diffgap

STABLE_TORCH_LIBRARY_IMPL(diffgap, CPU, m) { m.impl("solver_step", TORCH_BOX(&diffgap::solver_step)); }
