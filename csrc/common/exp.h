// Exponentials and logarithms in float32 for arguments that losses have, branch-free so that compilers vectorise
// them; about 1 ulp. The polynomials are this project's own minimax fits. NaN stays NaN.
#pragma once

#include "common/macros.h"
#include "common/normal.h"

namespace diffgap {

// e**x for x <= 0; 0 where the result would be subnormal.
DIFFGAP_HD float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = fmaf(bounded, 1.44269504f, kRound);
  const float n = shifted - kRound;
  // x = n ln 2 + r; the first part of ln 2 has few bits, so that its product with n is exact
  const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, bounded));
  // e**r = 1 + r + r**2 p
  float p = fmaf(0.00139504916f, r, 0.0083688898f);
  p = fmaf(p, r, 0.041666206f);
  p = fmaf(p, r, 0.166665182f);
  p = fmaf(p, r, 0.5f);
  const float fraction = fmaf(r * r, p, r) + 1.0f;
  const float result = bits_to_float(float_to_bits(fraction) + (float_to_bits(shifted) << 23));
  return x < -87.0f ? 0.0f : result;
}

// ln(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)).
DIFFGAP_HD float log1p_unit(float x) {
  const float s = x / (2.0f + x), s2 = s * s;
  float p = fmaf(0.280244589f, s2, 0.279991418f);
  p = fmaf(p, s2, 0.400216997f);
  p = fmaf(p, s2, 0.666664124f);
  return fmaf(s * s2, p, 2.0f * s);
}

struct Softplus {
  float value, slope;
};

// ln(1 + e**x) and its derivative, the logistic function.
DIFFGAP_HD Softplus softplus(float x) {
  const float e = exp_nonpositive(x > 0.0f ? -x : x);
  const float inverse = 1.0f / (1.0f + e);
  return {(x > 0.0f ? x : 0.0f) + log1p_unit(e), x > 0.0f ? inverse : e * inverse};
}

}  // namespace diffgap
