// The elements of a solver step; diffgap/ops/solver_step.py has the formula.
#pragma once

#include "common/macros.h"

namespace diffgap {

// A row of a solver table, in the order of diffgap.ops.solver_step.COLUMNS.
struct StepRow {
  float x0_sample, x0_output;
  float corr_sample, corr_last, corr_x0, corr_h1, corr_h2, corr_h3;
  float pred_corrected, pred_sample, pred_output, pred_x0, pred_h1, pred_h2, pred_h3, pred_noise;
};
constexpr int kStepColumns = sizeof(StepRow) / sizeof(float);

// Classifier-free guidance in one of its two formulations.
struct Guidance {
  float scale;
  bool offset_form;
};

// Here and below Float is a float or, on the host, a vector of them.
template <typename Float>
DIFFGAP_HD Float guide(Guidance guidance, Float conditional, Float unconditional) {
  const Float base = guidance.offset_form ? conditional : unconditional;
  return base + guidance.scale * (conditional - unconditional);
}

// NaN stays NaN. `limit` may be infinite.
template <typename Float>
DIFFGAP_HD Float clamp(Float x, float limit) {
  const Float bound = Float{} + limit;
  const Float above = x < -bound ? -bound : x;
  return above > bound ? bound : above;
}

// What an element's step reads; absent terms are zero.
template <typename Float>
struct StepTerms {
  Float sample, output, x0, last, h1, h2, h3, noise;
};

// The terms of earlier predictions past `history` and, if not `noisy`, of the noise are left out: even a term of zero
// costs its share of arithmetic.
template <int history = 3, typename Float>
DIFFGAP_HD Float correct(const StepRow& c, const StepTerms<Float>& v) {
  Float x = c.corr_sample * v.sample + c.corr_last * v.last + c.corr_x0 * v.x0;
  if constexpr (history > 0) x += c.corr_h1 * v.h1;
  if constexpr (history > 1) x += c.corr_h2 * v.h2;
  if constexpr (history > 2) x += c.corr_h3 * v.h3;
  return x;
}

template <int history = 3, bool noisy = true, typename Float>
DIFFGAP_HD Float advance(const StepRow& c, const StepTerms<Float>& v, Float corrected) {
  Float x = c.pred_corrected * corrected + c.pred_sample * v.sample + c.pred_output * v.output + c.pred_x0 * v.x0;
  if constexpr (history > 0) x += c.pred_h1 * v.h1;
  if constexpr (history > 1) x += c.pred_h2 * v.h2;
  if constexpr (history > 2) x += c.pred_h3 * v.h3;
  if constexpr (noisy) x += c.pred_noise * v.noise;
  return x;
}

}  // namespace diffgap
