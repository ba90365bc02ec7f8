// The arguments of diffgap::solver_step, checked before any work is done; diffgap/ops/solver_step.py explains them.
#pragma once

#include <cmath>
#include <tuple>

#include "common/solver_math.h"
#include "common/tensor.h"

namespace diffgap {

// The arguments as the schema has them.
struct StepArguments {
  Tensor sample, output, table;
  std::optional<Tensor> steps;  // then `step` is not used
  int64_t step;
  std::optional<Tensor> unconditional;
  double guidance_scale;
  bool offset_form;
  double guidance_rescale;
  std::optional<Tensor> last_sample, h1, h2, h3, seed;
  std::optional<double> x0_clamp, x0_norm;

  int64_t samples() const { return sample.size(0); }
  bool rescaled() const { return unconditional && guidance_rescale != 0.0; }
  Guidance guidance() const { return {static_cast<float>(guidance_scale), offset_form}; }
};

// Where the results go; absent ones are not wanted.
struct StepResults {
  Tensor next;
  std::optional<Tensor> x0, corrected;
};

inline void check_positive(const char* name, const std::optional<double>& value) {
  STD_TORCH_CHECK(!value || (std::isfinite(*value) && *value > 0.0), name, ": must be positive and finite");
}

// The arguments in memory without gaps, except for `steps` and `seed`.
inline StepArguments checked(StepArguments a) {
  const Tensor sample = a.sample;
  STD_TORCH_CHECK(sample.dim() >= 1, "sample: expected shape (B, ...), got a scalar");
  a.sample = dense(sample);
  const auto check_term = [&](const char* name, Tensor& x) {
    STD_TORCH_CHECK(same_shape(x, sample) && x.scalar_type() == sample.scalar_type() && same_device(x, sample), name,
                    ": expected the sample's shape, dtype and device");
    x = dense(x);
  };
  check_term("output", a.output);
  if (a.unconditional) check_term("unconditional", *a.unconditional);
  if (a.last_sample) check_term("last_sample", *a.last_sample);
  if (a.h1) check_term("h1", *a.h1);
  if (a.h2) check_term("h2", *a.h2);
  if (a.h3) check_term("h3", *a.h3);
  for (const auto& [name, index] : {std::pair("steps", &a.steps), std::pair("seed", &a.seed)}) {
    if (!*index) continue;
    check_index(name, **index, a.samples());
    STD_TORCH_CHECK(same_device(**index, sample), name, ": expected the sample's device");
  }

  a.table = checked_table(a.table, kStepColumns, sample);
  if (!a.steps) check_row("step", a.step, a.table.size(0));

  STD_TORCH_CHECK(std::isfinite(a.guidance_scale), "guidance_scale: must be finite");
  STD_TORCH_CHECK(a.guidance_rescale >= 0.0 && a.guidance_rescale <= 1.0, "guidance_rescale: must lie in [0, 1]");
  STD_TORCH_CHECK(!a.rescaled() || elements_per_sample(sample) > 1,
                  "guidance_rescale: needs more than one element per sample");
  STD_TORCH_CHECK(!a.x0_clamp || !a.x0_norm, "x0_norm: x0 can be clamped or put on a sphere, not both");
  check_positive("x0_clamp", a.x0_clamp);
  check_positive("x0_norm", a.x0_norm);
  STD_TORCH_CHECK(!a.x0_norm || sample.dim() >= 2, "x0_norm: needs a sample of two dimensions or more");
  return a;
}

// Each result may be the memory of an argument, because an element is read before it is written; memory that overlaps
// in any other way may not.
inline void check_results(const StepArguments& a, const StepResults& results) {
  const Tensor& sample = a.sample;
  const auto begin = [](const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); };
  const int64_t bytes = sample.numel() * static_cast<int64_t>(sample.element_size());
  const auto overlap = [&](const Tensor& x, const Tensor& y) {
    return begin(x) < begin(y) + bytes && begin(y) < begin(x) + bytes;
  };
  const Tensor* outs[] = {&results.next, results.x0 ? &*results.x0 : nullptr,
                          results.corrected ? &*results.corrected : nullptr};
  const auto check_terms = [&](const Tensor& out, const std::optional<Tensor>& term) {
    STD_TORCH_CHECK(!term || begin(out) == begin(*term) || !overlap(out, *term),
                    "out: shares a part of its memory with an argument");
  };
  for (const Tensor* out : outs) {
    if (!out) continue;
    STD_TORCH_CHECK(same_shape(*out, sample) && out->scalar_type() == sample.scalar_type() &&
                        same_device(*out, sample) && out->is_contiguous(),
                    "out: expected contiguous tensors of the sample's shape, dtype and device");
    for (const Tensor* other : outs) {
      STD_TORCH_CHECK(!other || other == out || !overlap(*out, *other), "out: two results share memory");
    }
    for (const auto* term : {&a.unconditional, &a.last_sample, &a.h1, &a.h2, &a.h3}) check_terms(*out, *term);
    for (const auto& term : {sample, a.output}) check_terms(*out, term);
  }
  STD_TORCH_CHECK(!results.corrected || a.last_sample, "out: corrected is given, but no last_sample");
}

// Fresh memory for the results of the functional form.
inline StepResults new_results(const StepArguments& a) {
  return {new_like(a.sample), new_like(a.sample),
          a.last_sample ? std::optional(new_like(a.sample)) : std::nullopt};
}

// Registers both forms of the op over `run(const StepArguments&, const StepResults&)`.
template <void (*run)(const StepArguments&, const StepResults&)>
struct SolverStep {
  static std::tuple<Tensor, Tensor, Tensor> functional(
      Tensor sample, Tensor output, Tensor table, std::optional<Tensor> steps, int64_t step,
      std::optional<Tensor> unconditional, double guidance_scale, bool offset_form, double guidance_rescale,
      std::optional<Tensor> last_sample, std::optional<Tensor> h1, std::optional<Tensor> h2, std::optional<Tensor> h3,
      std::optional<Tensor> seed, std::optional<double> x0_clamp, std::optional<double> x0_norm) {
    const StepArguments a = checked({sample, output, table, steps, step, unconditional, guidance_scale, offset_form,
                                     guidance_rescale, last_sample, h1, h2, h3, seed, x0_clamp, x0_norm});
    const StepResults results = new_results(a);
    run(a, results);
    const Tensor none = results.corrected ? *results.corrected : torch::stable::new_empty(a.sample, {0});
    return {results.next, *results.x0, none};
  }

  static void out(Tensor sample, Tensor output, Tensor table, std::optional<Tensor> steps, int64_t step,
                  std::optional<Tensor> unconditional, double guidance_scale, bool offset_form,
                  double guidance_rescale, std::optional<Tensor> last_sample, std::optional<Tensor> h1,
                  std::optional<Tensor> h2, std::optional<Tensor> h3, std::optional<Tensor> seed,
                  std::optional<double> x0_clamp, std::optional<double> x0_norm, Tensor next, std::optional<Tensor> x0,
                  std::optional<Tensor> corrected) {
    const StepArguments a = checked({sample, output, table, steps, step, unconditional, guidance_scale, offset_form,
                                     guidance_rescale, last_sample, h1, h2, h3, seed, x0_clamp, x0_norm});
    const StepResults results{next, x0, corrected};
    check_results(a, results);
    run(a, results);
  }
};

}  // namespace diffgap
