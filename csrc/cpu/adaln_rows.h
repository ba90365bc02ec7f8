// The passes of diffgap::adaln over one row of features in float32, each over whole vectors and then what remains.
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
#include <cstring>

#include "common/macros.h"
#include "cpu/product.h"

namespace diffgap {
namespace adaln_rows {

constexpr float kEpsilon = 1e-6f;

template <int lanes>
struct FloatsOf {
  using Type = typename Registers<lanes>::Vector;
};
template <>
struct FloatsOf<1> {
  using Type = float;
};
template <int lanes>
using Lanes = typename FloatsOf<lanes>::Type;

template <int lanes>
DIFFGAP_HD Lanes<lanes> load(const float* source) {
  return *reinterpret_cast<const Lanes<lanes>*>(source);
}
template <int lanes>
DIFFGAP_HD void store(float* target, Lanes<lanes> value) {
  *reinterpret_cast<Lanes<lanes>*>(target) = value;
}

// Past the caches if `kPast`; the target is then aligned to cache lines, and fence_stores() must follow.
template <int lanes, bool kPast>
DIFFGAP_HD void store_result(float* target, Lanes<lanes> value) {
#if defined(__x86_64__) && defined(__GNUC__)
  // In assembly, since an intrinsic needs its instruction set where it is written, not where it is inlined.
  if constexpr (kPast && lanes > 4) {
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<Lanes<lanes>*>(target)) : "v"(value));
    return;
  } else if constexpr (kPast && lanes == 4) {
    asm("movntps %1, %0" : "=m"(*reinterpret_cast<Lanes<lanes>*>(target)) : "x"(value));
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

template <int lanes>
DIFFGAP_HD float sum_lanes(Lanes<lanes> value) {
  if constexpr (lanes > 4) {
    Lanes<lanes / 2> halves[2];
    std::memcpy(halves, &value, sizeof(value));
    return sum_lanes<lanes / 2>(halves[0] + halves[1]);
  } else {
    return (value[0] + value[2]) + (value[1] + value[3]);
  }
}

// Calls `step.at<lanes>(i)` for all i < n: whole vectors, then the elements that remain.
template <int lanes, typename Step>
DIFFGAP_HD void for_each(const Step& step, int n) {
  int i = 0;
  for (; i + lanes <= n; i += lanes) step.template at<lanes>(i);
  for (; i < n; ++i) step.template at<1>(i);
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

struct Sum {
  static constexpr int sums = 1;
  const float* y;

  template <int lanes>
  DIFFGAP_HD void at(int i, Lanes<lanes>* sum) const {
    *sum += load<lanes>(y + i);
  }
};

// y = x + gate * branch and its sum; if `kPast`, a copy of y goes past the caches to `copy`.
template <bool kPast = false>
struct AddBranch {
  static constexpr int sums = 1;
  const float *x, *branch, *gate;
  float *y, *copy = nullptr;

  template <int lanes>
  DIFFGAP_HD void at(int i, Lanes<lanes>* sum) const {
    const Lanes<lanes> value = load<lanes>(x + i) + load<lanes>(gate + i) * load<lanes>(branch + i);
    store<lanes>(y + i, value);
    if constexpr (kPast) store_result<lanes, true>(copy + i, value);
    *sum += value;
  }
};

// Sums of c and c^2.
struct Moments {
  static constexpr int sums = 2;
  const float* y;
  float mean;

  template <int lanes>
  DIFFGAP_HD void at(int i, Lanes<lanes>* sum) const {
    const Lanes<lanes> c = load<lanes>(y + i) - mean;
    sum[0] += c;
    sum[1] += c * c;
  }
};

// Sums of c, c^2, a and a c.
struct GradientMoments {
  static constexpr int sums = 4;
  const float *y, *grad_h, *scale;
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
template <bool kPast>
struct Modulate {
  const float *y, *shift, *scale;
  Norm norm;
  float* h;

  template <int lanes>
  DIFFGAP_HD void at(int i) const {
    const Lanes<lanes> normed = norm.at<lanes>(load<lanes>(y + i));
    store_result<lanes, kPast>(h + i, normed * (1.0f + load<lanes>(scale + i)) + load<lanes>(shift + i));
  }
};

// What the gradients of a row are made from, and where they go: dx may replace y, and dbranch branch.
struct GradientRow {
  const float *y, *grad_y, *grad_h, *branch, *gate, *scale;
  Norm norm;
  float mean_a, mean_a_normed;
  float *dx, *dbranch, *dgate, *dshift, *dscale;
};

// All gradients of a row; those of the modulation are added to what is there if its tokens share it.
template <bool kGated, bool kShared, bool kPast>
struct Gradients {
  GradientRow row;

  template <int lanes>
  DIFFGAP_HD void at(int i) const {
    const Lanes<lanes> normed = row.norm.at<lanes>(load<lanes>(row.y + i)), g = load<lanes>(row.grad_h + i);
    const Lanes<lanes> a = g * (1.0f + load<lanes>(row.scale + i));
    const Lanes<lanes> dy =
        load<lanes>(row.grad_y + i) + row.norm.rstd * (a - row.mean_a - normed * row.mean_a_normed);
    store_result<lanes, kPast>(row.dx + i, dy);
    put<lanes>(row.dshift + i, g);
    put<lanes>(row.dscale + i, g * normed);
    if constexpr (kGated) {
      put<lanes>(row.dgate + i, dy * load<lanes>(row.branch + i));
      store_result<lanes, kPast>(row.dbranch + i, dy * load<lanes>(row.gate + i));
    }
  }

  template <int lanes>
  static DIFFGAP_HD void put(float* target, Lanes<lanes> value) {
    store<lanes>(target, kShared ? load<lanes>(target) + value : value);
  }
};

template <int lanes, bool kPast>
DIFFGAP_HD void write_gradients(const GradientRow& row, bool gated, bool shared, int n) {
  if (gated) {
    shared ? for_each<lanes>(Gradients<true, true, kPast>{row}, n)
           : for_each<lanes>(Gradients<true, false, kPast>{row}, n);
  } else {
    shared ? for_each<lanes>(Gradients<false, true, kPast>{row}, n)
           : for_each<lanes>(Gradients<false, false, kPast>{row}, n);
  }
}

}  // namespace adaln_rows
}  // namespace diffgap
