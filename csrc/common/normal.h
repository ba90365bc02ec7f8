// Box-Muller in float32, branch-free, of single floats or of vectors of them. The definition, in float64, is in
// diffgap/ops/random.py; the two agree within 2 ulp.
//
// Every multiplication that feeds an addition is a fused multiply-add, so that no compiler setting
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

// The integers beside a float or a vector of floats, and what C++ has for one but not for the other.
template <typename Float>
struct Lanewise;

template <>
struct Lanewise<float> {
  using Int = int32_t;
  using Unsigned = uint32_t;
  static DIFFGAP_HD float of_bits(int32_t bits) { return bits_to_float(bits); }
  static DIFFGAP_HD int32_t to_bits(float x) { return float_to_bits(x); }
  template <typename Integer>
  static DIFFGAP_HD float convert(Integer x) {
    return static_cast<float>(x);
  }
  static DIFFGAP_HD float square_root(float x) { return sqrtf(x); }
};

DIFFGAP_HD float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

#if !defined(__CUDACC__)
template <typename Vector>
struct Lanewise {
  typedef int32_t Int __attribute__((vector_size(sizeof(Vector))));
  typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Vector))));
  static DIFFGAP_HD Vector of_bits(Int bits) { return reinterpret_cast<Vector>(bits); }
  static DIFFGAP_HD Int to_bits(Vector x) { return reinterpret_cast<Int>(x); }
  template <typename Integers>
  static DIFFGAP_HD Vector convert(Integers x) {
    return __builtin_convertvector(x, Vector);
  }
  static DIFFGAP_HD Vector square_root(Vector x) {
    Vector root;
#if defined(__x86_64__)
    if constexpr (sizeof(Vector) >= 32) {  // AVX2's and AVX-512's
      asm("vsqrtps %1, %0" : "=v"(root) : "v"(x));
      return root;
    }
#endif
    for (unsigned i = 0; i < sizeof(Vector) / sizeof(float); ++i) root[i] = sqrtf(x[i]);
    return root;
  }
};

// Only for instruction sets that fuse; compiled with -ffp-contract=fast. That `c` comes out of an empty statement keeps
// the compiler from fusing a product in it instead.
template <typename Vector>
DIFFGAP_HD Vector fused_multiply_add(Vector a, Vector b, Vector c) {
#if defined(__x86_64__)
  if (!__builtin_constant_p(c[0])) asm("" : "+v"(c));
#endif
  return a * b + c;
}
#endif

// a * b + c with a constant for c.
template <typename Float>
DIFFGAP_HD Float fused(Float a, Float b, float c) {
  return fused_multiply_add(a, b, Float{} + c);
}

// An unevaluated sum of two floats: about twice the precision of one.
template <typename Float>
struct Pair {
  Float high, low;
};

// -2 ln(x) of a positive normal number.
template <typename Float>
DIFFGAP_HD Pair<Float> minus_two_log(Float x) {
  using Lanes = Lanewise<Float>;
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  const auto bits = Lanes::to_bits(x);
  const auto exponent = (bits - kSqrtHalf) >> 23;
  const Float f = Lanes::of_bits(bits - (exponent << 23)) - 1.0f;  // x = 2**exponent * (1 + f), f exact
  // ln(1 + f) = f + f**2 * (f * p - 1/2)
  Float p = fused_multiply_add(Float{} - 0.0763449743f, f, Float{} + 0.127615780f);
  p = fused(p, f, -0.131601825f);
  p = fused(p, f, 0.142017573f);
  p = fused(p, f, -0.166233569f);
  p = fused(p, f, 0.200012267f);
  p = fused(p, f, -0.250008196f);
  p = fused(p, f, 0.333333313f);
  const Float tail = fused(f, p, -0.5f);
  // ln 2 in two parts, the first with so few bits that its product with the exponent is exact. The largest
  // terms are added last and what the two additions lose is kept: it is exact, because either the exponent is
  // 0 or its term is larger than f.
  const Float e = Lanes::convert(exponent);
  const Float large = e * 0.693359375f;
  const Float sum = large + f;
  const Float lost = exponent == 0 ? Float{} : (large - sum) + f;
  const Float rest = fused_multiply_add(Float{} - 2.12194440e-4f, e, fused_multiply_add(f * f, tail, lost));
  const Float high = sum + rest;
  return {-2.0f * high, -2.0f * ((sum - high) + rest)};
}

// Square root of a pair whose low part is a rounding error of the high one; zero gives zero.
template <typename Float>
DIFFGAP_HD Pair<Float> square_root(Pair<Float> x) {
  using Lanes = Lanewise<Float>;
  using Unsigned = typename Lanes::Unsigned;
  const Float root = Lanes::square_root(x.high);
  const Float residual = fused_multiply_add(-root, root, x.high) + x.low;
  // 1 / sqrt(x) to 0.2 %, enough for a correction of one rounding error; for -0 any number.
  const Unsigned guess = 0x5F3759DFu - (Unsigned)(Lanes::to_bits(x.high) >> 1);
  Float inverse = Lanes::of_bits((typename Lanes::Int)guess);
  inverse *= fused(-0.5f * x.high, inverse * inverse, 1.5f);
  return {root, 0.5f * inverse * residual};
}

template <typename Float>
struct Normals {
  Float n0, n1;
};

// Two independent standard normals from two 32-bit words.
template <typename Float>
DIFFGAP_HD Normals<Float> box_muller(typename Lanewise<Float>::Unsigned radius_word,
                                     typename Lanewise<Float>::Unsigned angle_word) {
  using Lanes = Lanewise<Float>;
  using Int = typename Lanes::Int;
  const Float u = fused_multiply_add(Lanes::convert(radius_word), Float{} + 0x1p-32f, Float{} + 0x1p-33f);
  const Pair<Float> radius = square_root(minus_two_log(u));
  // The angle is pi * k * 2**-24 = pi * (quadrant / 2 + x) with -1/4 <= x <= 1/4, all exact.
  const Int k = (Int)((angle_word >> 8) * 2u + 1u);
  const Int quadrant = (k + (1 << 22)) >> 23;
  const Float x = Lanes::convert(k - (quadrant << 23)) * 0x1p-24f;
  const Float x2 = x * x;
  // sin(pi x) = x * (pi + x**2 * p), pi in two parts; cos(pi x) = 1 + x**2 * q
  const Float p = fused(fused_multiply_add(Float{} - 0.589418769f, x2, Float{} + 2.54980516f), x2, -5.16770887f);
  const Float sine = fused_multiply_add(x, Float{} + 3.14159274f, x * fused(x2, p, -8.74227766e-8f));
  Float q = fused_multiply_add(Float{} + 0.231364235f, x2, Float{} - 1.33505058f);
  q = fused(fused(q, x2, 4.05870771f), x2, -4.93480206f);
  const Float cosine = fused(x2, q, 1.0f);
  // Turn by the quadrant: swap in the odd ones, then set the signs.
  const auto odd = (quadrant & 1) != 0;
  const Int cosine_sign = ((quadrant + 1) & 2) << 30;
  const Int sine_sign = (quadrant & 2) << 30;
  const Float c = Lanes::of_bits(Lanes::to_bits(odd ? sine : cosine) ^ cosine_sign);
  const Float s = Lanes::of_bits(Lanes::to_bits(odd ? cosine : sine) ^ sine_sign);
  return {fused_multiply_add(radius.high, c, radius.low * c), fused_multiply_add(radius.high, s, radius.low * s)};
}

}  // namespace diffgap
