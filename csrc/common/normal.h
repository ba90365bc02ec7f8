// Box-Muller in float32, branch-free so that compilers vectorise it. The definition, in float64, is in
// diffgap/ops/random.py; the two agree within 2 ulp.
//
// Every multiplication that feeds an addition is an explicit fused multiply-add, so that no compiler setting
// (-ffp-contract, nvcc's -fmad) changes a bit: all machines and devices give the same numbers. On an x86-64
// without FMA (before 2013) that is a library call, right but slow. The polynomials are this project's own
// minimax fits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace diffgap {

DIFFGAP_HD float bits_to_float(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

DIFFGAP_HD int32_t float_to_bits(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// An unevaluated sum of two floats: about twice the precision of one.
struct Pair {
  float high, low;
};

// -2 ln(x) of a positive normal number.
DIFFGAP_HD Pair minus_two_log(float x) {
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  const int32_t bits = float_to_bits(x);
  const int32_t exponent = (bits - kSqrtHalf) >> 23;
  const float f = bits_to_float(bits - (exponent << 23)) - 1.0f;  // x = 2**exponent * (1 + f), f exact
  // ln(1 + f) = f + f**2 * (f * p - 1/2)
  float p = fmaf(-0.0763449743f, f, 0.127615780f);
  p = fmaf(p, f, -0.131601825f);
  p = fmaf(p, f, 0.142017573f);
  p = fmaf(p, f, -0.166233569f);
  p = fmaf(p, f, 0.200012267f);
  p = fmaf(p, f, -0.250008196f);
  p = fmaf(p, f, 0.333333313f);
  const float tail = (f * f) * fmaf(f, p, -0.5f);
  // ln 2 in two parts, the first with so few bits that its product with the exponent is exact. The largest
  // terms are added last and what the two additions lose is kept: it is exact, because either the exponent is
  // 0 or its term is larger than f.
  const float e = static_cast<float>(exponent);
  const float large = e * 0.693359375f;
  const float sum = large + f;
  const float lost = exponent == 0 ? 0.0f : (large - sum) + f;
  const float rest = fmaf(e, -2.12194440e-4f, tail + lost);
  const float high = sum + rest;
  return {-2.0f * high, -2.0f * ((sum - high) + rest)};
}

// Square root of a pair whose low part is a rounding error of the high one; zero gives zero.
DIFFGAP_HD Pair square_root(Pair x) {
  const float root = sqrtf(x.high);
  const float residual = fmaf(-root, root, x.high) + x.low;
  // 1 / sqrt(x) to 0.2 %, enough for a correction of one rounding error.
  float inverse = bits_to_float(0x5F3759DF - (float_to_bits(x.high) >> 1));
  inverse *= fmaf(-0.5f * x.high, inverse * inverse, 1.5f);
  return {root, 0.5f * inverse * residual};
}

struct Normals {
  float n0, n1;
};

// Two independent standard normals from two 32-bit words.
DIFFGAP_HD Normals box_muller(uint32_t radius_word, uint32_t angle_word) {
  const float u = fmaf(static_cast<float>(radius_word), 0x1p-32f, 0x1p-33f);
  const Pair radius = square_root(minus_two_log(u));
  // The angle is pi * k * 2**-24 = pi * (quadrant / 2 + x) with -1/4 <= x <= 1/4, all exact.
  const int32_t k = static_cast<int32_t>((angle_word >> 8) * 2 + 1);
  const int32_t quadrant = (k + (1 << 22)) >> 23;
  const float x = static_cast<float>(k - (quadrant << 23)) * 0x1p-24f;
  const float x2 = x * x;
  // sin(pi x) = x * (pi + x**2 * p), pi in two parts; cos(pi x) = 1 + x**2 * q
  const float p = fmaf(fmaf(-0.589418769f, x2, 2.54980516f), x2, -5.16770887f);
  const float sine = fmaf(x, 3.14159274f, x * fmaf(x2, p, -8.74227766e-8f));
  const float q = fmaf(fmaf(fmaf(0.231364235f, x2, -1.33505058f), x2, 4.05870771f), x2, -4.93480206f);
  const float cosine = fmaf(x2, q, 1.0f);
  // Turn by the quadrant: swap in the odd ones, then set the signs.
  const bool odd = (quadrant & 1) != 0;
  const int32_t cosine_sign = ((quadrant + 1) & 2) << 30;
  const int32_t sine_sign = (quadrant & 2) << 30;
  const float c = bits_to_float(float_to_bits(odd ? sine : cosine) ^ cosine_sign);
  const float s = bits_to_float(float_to_bits(odd ? cosine : sine) ^ sine_sign);
  return {fmaf(radius.high, c, radius.low * c), fmaf(radius.high, s, radius.low * s)};
}

}  // namespace diffgap
