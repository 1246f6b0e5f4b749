// SPDX-License-Identifier: Apache-2.0
// Functions of a Vec, part of vec.h. The polynomials are minimax fits (Remez, relative error) made
// for this file; the remarks give their error before rounding. T is the type that the kernel's
// result is going to be rounded to: 16 bits hide what costs time.
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

// ---- for results that are rounded to 16 bits, which hides the errors named here

// 2^f for |f| <= 0.5. 7.5e-5 and 2.6e-6: less than 0.04 ulp of the type.
OPMUX_INLINE Vec exp2_reduced(bfloat16, Vec f) {
  Vec p = fma(f, 5.51716760e-2f, 2.42611125e-1f);
  p = fma(p, f, 6.93260968e-1f);
  return fma(p, f, 9.99928057e-1f);
}
OPMUX_INLINE Vec exp2_reduced(float16, Vec f) {
  Vec p = fma(f, 9.57010780e-3f, 5.59178554e-2f);
  p = fma(p, f, 2.40247443e-1f);
  p = fma(p, f, 6.93121791e-1f);
  return fma(p, f, 9.99999285e-1f);
}

// 2^t. Above float's range inf; below it 0, from 2^-126 or less on.
template <class T>
OPMUX_INLINE Vec exp2_coarse(Vec t) {
#if defined(__AVX512F__)
  const Vec f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_reduced(T{}, f), t - f);
#else
  // Adding 1.5 * 2^23 rounds to an integer; 127 more make its low bits the exponent of 2^n, where
  // n = -127 is that of 0 and n = 128 that of inf.
  constexpr float kRound = 12582912.0f + 127.0f;
  t = max(splat(-127.0f), min(splat(128.0f), t));
  const Vec shifted = t + kRound;
  return exp2_reduced(T{}, t - (shifted - kRound)) * from_bits(bits_of(shifted) << 23);
#endif
}

// x * sigmoid(y) = x / (1 + exp(-y)). float: 2 ulp.
template <class T>
OPMUX_INLINE Vec times_sigmoid(Vec x, Vec y) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x / (1.0f + exp(-y));
  } else {
    return x / (1.0f + exp2_coarse<T>(y * -1.44269504f));
  }
}

template <class T>
OPMUX_INLINE Vec silu(Vec x) {
  return times_sigmoid<T>(x, x);
}

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

// log2 of the part of a normal distribution beyond t >= 0, for results of 16 bits: the part is
// right to 3.7e-4 (bfloat16, 0.1 ulp) and 3.3e-6 up to t = 6 and falls to 0 at infinity.
OPMUX_INLINE Vec log2_beyond(bfloat16, Vec t) {
  Vec p = fma(t, -2.01681411e-4f, 4.46756231e-3f);
  p = fma(p, t, -4.28325161e-2f);
  p = fma(p, t, -4.72786099e-1f);
  p = fma(p, t, -1.14439952f);
  return fma(p, t, -1.00053179f);
}
OPMUX_INLINE Vec log2_beyond(float16, Vec t) {
  Vec p = fma(t, -1.83493978e-6f, 6.16009493e-5f);
  p = fma(p, t, -9.30546434e-4f);
  p = fma(p, t, 8.50797724e-3f);
  p = fma(p, t, -5.39602451e-2f);
  p = fma(p, t, -4.58464235e-1f);
  p = fma(p, t, -1.15125108f);
  return fma(p, t, -9.99995291e-1f);
}

// The part of a normal distribution below x: (1 + erf(x / sqrt(2))) / 2.
template <class T>
OPMUX_INLINE Vec normal_cdf(Vec x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return 0.5f + 0.5f * erf(x * 0.707106781f);
  } else {
    const Vec beyond = exp2_coarse<T>(log2_beyond(T{}, abs(x)));
    return x < 0.0f ? beyond : 1.0f - beyond;
  }
}

}  // namespace
}  // namespace opmux::cpu
