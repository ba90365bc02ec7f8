// Exponentials and logarithms in float32 for arguments that losses have, branch-free so that compilers vectorise
// them; about 1 ulp. The polynomials are this project's own minimax fits. NaN stays NaN.
#pragma once

#include "common/macros.h"
#include "common/normal.h"

namespace diffgap {

// x * 2**n, given 1.5 * 2**23 + n. Unsigned, because the bits of NaN overflow.
DIFFGAP_HD float scale_by_power(float x, float shifted) {
  const uint32_t power = static_cast<uint32_t>(float_to_bits(shifted)) << 23;
  return bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(float_to_bits(x)) + power));
}

#if !defined(__CUDACC__)
// The same for vectors of floats.
template <typename Vector>
DIFFGAP_HD Vector scale_by_power(Vector x, Vector shifted) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vector))));
  return reinterpret_cast<Vector>(reinterpret_cast<Bits>(x) + (reinterpret_cast<Bits>(shifted) << 23));
}
#endif

// e**x for x <= 0; 0 where the result would be subnormal. Of a float, or of each in a vector.
template <typename Float>
DIFFGAP_HD Float exp_nonpositive(Float x) {
  const auto all = [](float value) { return Float{} + value; };
  const Float round = all(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
  const Float bounded = x < -87.0f ? all(-87.0f) : x;
  const Float shifted = fused_multiply_add(bounded, all(1.44269504f), round);
  const Float n = shifted - round;
  // x = n ln 2 + r; the first part of ln 2 has few bits, so that its product with n is exact
  const Float r = fused_multiply_add(n, all(2.12194440e-4f), fused_multiply_add(n, all(-0.693359375f), bounded));
  // e**r = 1 + r + r**2 p
  Float p = fused_multiply_add(all(0.00139504916f), r, all(0.0083688898f));
  p = fused_multiply_add(p, r, all(0.041666206f));
  p = fused_multiply_add(p, r, all(0.166665182f));
  p = fused_multiply_add(p, r, all(0.5f));
  const Float fraction = fused_multiply_add(r * r, p, r) + 1.0f;
  const Float result = scale_by_power(fraction, shifted);
  return x < -87.0f ? Float{} : result;
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
