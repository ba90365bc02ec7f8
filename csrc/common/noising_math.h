// The coefficients of forward noising; diffgap/ops/q_sample.py has the formula.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace diffgap {

// x_t = alpha * x0 + sigma * noise, target = clean * x0 + noisy * noise
struct NoisingRow {
  float alpha, sigma, clean, noisy;
};

enum Target : int64_t { kEpsilon, kSample, kVPrediction, kFlowPrediction };  // TARGETS in q_sample.py
constexpr int64_t kTargets = 4;

DIFFGAP_HD NoisingRow noising_row(float alpha, float sigma, int64_t target) {
  switch (target) {
    case kEpsilon:
      return {alpha, sigma, 0.0f, 1.0f};
    case kSample:
      return {alpha, sigma, 1.0f, 0.0f};
    case kVPrediction:
      return {alpha, sigma, -sigma, alpha};
    default:  // kFlowPrediction
      return {alpha, sigma, -1.0f, 1.0f};
  }
}

// Without x0 where the target has none of it, so that the noise stays what it is beside an x0 that is not finite. Float
// is a float or, on the host, a vector of them.
template <typename Float>
DIFFGAP_HD Float noising_target(const NoisingRow& row, Float clean, Float noise) {
  const Float noisy = row.noisy * noise;
  return row.clean != 0.0f ? row.clean * clean + noisy : noisy;
}

}  // namespace diffgap
