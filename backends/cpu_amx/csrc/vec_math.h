// SPDX-License-Identifier: Apache-2.0
// Functions of a Vec, part of vec.h. The polynomials are minimax fits (Remez, relative error) made
// for this file; the remarks give their error before rounding. Each function takes the type that
// its result is going to be rounded to; float by default.
#pragma once

namespace opmux::cpu {
namespace {

// exp(r) for |r| <= ln(2)/2: 1 + r + r^2 * q(r). 3.3e-9.
OPMUX_INLINE Vec exp_reduced(Vec r) {
  Vec q = fma(r, 1.38131692e-3f, 8.36941879e-3f);
  q = fma(q, r, 4.16684560e-2f);
  q = fma(q, r, 1.66665152e-1f);
  q = fma(q, r, 4.99999940e-1f);
  return fma(q, r * r, r) + 1.0f;
}

// p * 2^n, n integral, with one rounding where the result is subnormal.
OPMUX_INLINE Vec scale_by_power(Vec p, Vec n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  // Two steps: 2^n itself may lie outside float's range although the product does not.
#if defined(__AVX2__)
  const VecI k = (VecI)_mm256_cvtps_epi32(n);
#else
  const VecI k = (VecI)_mm_cvtps_epi32(n);
#endif
  const VecI half = k >> 1;
  return p * from_bits((half + 127) << 23) * from_bits((k - half + 127) << 23);
#endif
}

// 1 ulp. exp(-inf) = 0, exp(inf) = inf, NaN stays.
OPMUX_INLINE Vec exp(Vec x) {
  // Beyond these the result is 0 or inf; NaN passes as the second operand.
  x = max(splat(-104.0f), min(splat(89.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer.
  const Vec n = fma(x, 1.44269504f, 12582912.0f) - 12582912.0f;
  Vec r = fma(n, -0.693359375f, x);  // ln 2 in two parts: n times the first is exact
  r = fma(n, 2.12194440e-4f, r);
  return scale_by_power(exp_reduced(r), n);
}

// 1 / (1 + exp(-x)). 2 ulp.
OPMUX_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// 2 ulp.
OPMUX_INLINE Vec erf(Vec x) {
  const Vec t = min(splat(4.0f), abs(x));  // erf(4) rounds to 1; NaN passes
  // |x| < 0.9: x * P(x^2). 1.2e-8.
  const Vec s = t * t;
  Vec near = fma(s, -6.09035022e-4f, 5.01196086e-3f);
  near = fma(near, s, -2.67789066e-2f);
  near = fma(near, s, 1.12821408e-1f);
  near = fma(near, s, -3.76125246e-1f);
  near = fma(near, s, 1.12837911f) * t;
  // Else 1 - exp(P(|x|)), P close to log(erfc). 2.8e-8 of the result.
  Vec far = fma(t, -1.26128888e-3f, 1.56518556e-2f);
  far = fma(far, t, -9.13207382e-2f);
  far = fma(far, t, -6.50456667e-1f);
  far = fma(far, t, -1.12039578f);
  far = fma(far, t, -1.82278815e-3f);
  far = 1.0f - exp(far);
  return copysign(t < 0.9f ? near : far, x);
}

}  // namespace
}  // namespace opmux::cpu
