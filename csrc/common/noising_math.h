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

}  // namespace diffgap
