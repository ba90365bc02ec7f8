// The passes of diffgap::adaln over one row of features in float32, whatever the elements' type T, each over
// whole vectors and then what remains.
//
// A row comes from memory once; the passes over it find it in the first-level cache. Its statistics take two: the mean
// m0, which float32 rounds, then the moments of c = y - m0, which correct it:
//
//   delta = mean(c),   variance = mean(c^2) - delta^2,   normed = (c - delta) / sqrt(variance + epsilon).
//
// Backward, with a = grad_h (1 + scale), r = 1 / sqrt(variance + epsilon) and means over the features:
//
//   dy = grad_y + r (a - mean(a) - normed mean(a normed)),   dx = dy,   dbranch = gate dy,
//   dgate = dy branch,   dscale = grad_h normed,   dshift = grad_h,   summed over the tokens that share a row of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "cpu/lanes.h"

namespace diffgap {
namespace adaln_rows {

constexpr float kEpsilon = 1e-6f;

// Past the caches if `kPast`; the target is then aligned to cache lines, and fence_stores() must follow.
template <int lanes, bool kPast, typename T>
DIFFGAP_HD void store_result(T* target, Lanes<lanes> value) {
#if defined(__x86_64__) && defined(__GNUC__)
  // In assembly, since an intrinsic needs its instruction set where it is written, not where it is inlined.
  if constexpr (kPast && std::is_same_v<T, float> && lanes > 4) {
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<Lanes<lanes>*>(target)) : "v"(value));
    return;
  } else if constexpr (kPast && !std::is_same_v<T, float> && lanes > 4) {
    typename LanesOf<lanes>::Halves halves;
    store<lanes>(reinterpret_cast<T*>(&halves), value);
    asm("vmovntdq %1, %0" : "=m"(*reinterpret_cast<typename LanesOf<lanes>::Halves*>(target)) : "x"(halves));
    return;
  }
#endif
  store<lanes>(target, value);
}

inline void fence_stores() {
#if defined(__x86_64__) && defined(__GNUC__)
  asm volatile("sfence" ::: "memory");
#endif
}

// The sums of `step.at<lanes>(i, sums)` over all i < n; Step::sums of them.
template <int lanes, typename Step>
DIFFGAP_HD void reduce(const Step& step, int n, float* totals) {
  Lanes<lanes> even[Step::sums] = {}, odd[Step::sums] = {};
  float rest[Step::sums] = {};
  int i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    step.template at<lanes>(i, even);
    step.template at<lanes>(i + lanes, odd);
  }
  for (; i + lanes <= n; i += lanes) step.template at<lanes>(i, even);
  for (; i < n; ++i) step.template at<1>(i, rest);
  for (int k = 0; k < Step::sums; ++k) totals[k] = sum_lanes<lanes>(even[k] + odd[k]) + rest[k];
}

template <typename T>
struct Sum {
  static constexpr int sums = 1;
  const T* y;

  template <int lanes>
  DIFFGAP_HD void at(int i, Lanes<lanes>* sum) const {
    *sum += load<lanes>(y + i);
  }
};

// y = x + gate * branch and its sum; the result of the type of x is a copy of y unless it is y itself.
template <typename T, bool kCopy, bool kPast>
struct AddBranch {
  static constexpr int sums = 1;
  const T *x, *branch, *gate;
  float* y;
  T* copy;

  template <int lanes>
  DIFFGAP_HD void at(int i, Lanes<lanes>* sum) const {
    const Lanes<lanes> value = load<lanes>(x + i) + load<lanes>(gate + i) * load<lanes>(branch + i);
    store<lanes>(y + i, value);
    if constexpr (kCopy) store_result<lanes, kPast>(copy + i, value);
    *sum += value;
  }
};

// Sums of c and c^2.
template <typename Y>
struct Moments {
  static constexpr int sums = 2;
  const Y* y;
  float mean;

  template <int lanes>
  DIFFGAP_HD void at(int i, Lanes<lanes>* sum) const {
    const Lanes<lanes> c = load<lanes>(y + i) - mean;
    sum[0] += c;
    sum[1] += c * c;
  }
};

// Sums of c, c^2, a and a c.
template <typename T, typename Y>
struct GradientMoments {
  static constexpr int sums = 4;
  const Y* y;
  const T *grad_h, *scale;
  float mean;

  template <int lanes>
  DIFFGAP_HD void at(int i, Lanes<lanes>* sum) const {
    const Lanes<lanes> c = load<lanes>(y + i) - mean;
    const Lanes<lanes> a = load<lanes>(grad_h + i) * (1.0f + load<lanes>(scale + i));
    sum[0] += c;
    sum[1] += c * c;
    sum[2] += a;
    sum[3] += a * c;
  }
};

// normed = (y - mean) * rstd - offset.
struct Norm {
  float mean, rstd, offset;

  static DIFFGAP_HD Norm of(float mean, const float* moments, int n) {
    const float delta = moments[0] / n;
    const float variance = moments[1] / n - delta * delta;
    // One feature is its own mean, so y has no influence on it; a - mean(a) is 0 but for rounding, which rstd enlarges.
    const float rstd = n == 1 ? 0.0f : 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + kEpsilon);
    return {mean, rstd, delta * rstd};
  }

  template <int lanes>
  DIFFGAP_HD Lanes<lanes> at(Lanes<lanes> y) const {
    return (y - mean) * rstd - offset;
  }
};

// h = normed * (1 + scale) + shift.
template <typename T, typename Y, bool kPast>
struct Modulate {
  const Y* y;
  const T *shift, *scale;
  Norm norm;
  T* h;

  template <int lanes>
  DIFFGAP_HD void at(int i) const {
    const Lanes<lanes> normed = norm.at<lanes>(load<lanes>(y + i));
    store_result<lanes, kPast>(h + i, normed * (1.0f + load<lanes>(scale + i)) + load<lanes>(shift + i));
  }
};

// All gradients of a row; dx may replace y. Those of the modulation are added to sums in float32 if its tokens share
// it, else stored.
template <typename T, typename Y, bool kGated, bool kShared, bool kPast>
struct Gradients {
  using Sums = std::conditional_t<kShared, float, T>;

  const Y* y;
  const T *grad_y, *grad_h, *branch, *gate, *scale;
  Norm norm;
  float mean_a, mean_a_normed;
  T *dx, *dbranch;
  Sums *dgate, *dshift, *dscale;

  template <int lanes>
  DIFFGAP_HD void at(int i) const {
    const Lanes<lanes> normed = norm.at<lanes>(load<lanes>(y + i)), g = load<lanes>(grad_h + i);
    const Lanes<lanes> a = g * (1.0f + load<lanes>(scale + i));
    const Lanes<lanes> dy = load<lanes>(grad_y + i) + norm.rstd * (a - mean_a - normed * mean_a_normed);
    store_result<lanes, kPast>(dx + i, dy);
    put<lanes>(dshift + i, g);
    put<lanes>(dscale + i, g * normed);
    if constexpr (kGated) {
      put<lanes>(dgate + i, dy * load<lanes>(branch + i));
      store_result<lanes, kPast>(dbranch + i, dy * load<lanes>(gate + i));
    }
  }

  template <int lanes>
  static DIFFGAP_HD void put(Sums* target, Lanes<lanes> value) {
    store<lanes>(target, kShared ? load<lanes>(target) + value : value);
  }
};

}  // namespace adaln_rows
}  // namespace diffgap
