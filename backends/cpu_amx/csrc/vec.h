// SPDX-License-Identifier: Apache-2.0
// Vectors of floats for kernels: 16, 8 or 4 lanes, whatever the ISA of this compilation has.
// Arithmetic, comparison and ?: are the compiler's own for vector types. Kernels compute in
// float32; load and store convert from and to the element type, rounding once, to nearest even.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define OPMUX_INLINE inline __attribute__((always_inline))

namespace opmux::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using VecI = int32_t __attribute__((vector_size(kLanes * 4)));  // also what comparisons give

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

OPMUX_INLINE Vec splat(float x) { return x - Vec{}; }
OPMUX_INLINE VecI splat(int32_t x) { return x - VecI{}; }
OPMUX_INLINE VecI bits_of(Vec v) { return (VecI)v; }
OPMUX_INLINE Vec from_bits(VecI v) { return (Vec)v; }

// a * b + c, in one rounding where the ISA has it.
OPMUX_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
OPMUX_INLINE Vec fma(Vec a, float b, Vec c) { return fma(a, splat(b), c); }
OPMUX_INLINE Vec fma(Vec a, Vec b, float c) { return fma(a, b, splat(c)); }
OPMUX_INLINE Vec fma(Vec a, float b, float c) { return fma(a, splat(b), splat(c)); }

// The second operand where either is NaN, as the instructions do.
OPMUX_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return _mm_min_ps(a, b);
#endif
}
OPMUX_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return _mm_max_ps(a, b);
#endif
}

OPMUX_INLINE Vec abs(Vec v) { return from_bits(bits_of(v) & 0x7fffffff); }
OPMUX_INLINE Vec copysign(Vec magnitude, Vec sign) {
  return from_bits((bits_of(magnitude) & 0x7fffffff) | (bits_of(sign) & INT32_MIN));
}

// Folds by halves: the order is that of a tree, the same on every call.
template <class F>
OPMUX_INLINE float reduce(Vec v, const F& f) {
#if defined(__AVX512F__)
  const __m256 eight = f(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
  const __m256 eight = v;
#endif
#if defined(__AVX2__)
  const __m128 four = f(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const __m128 four = v;
#endif
  const __m128 two = f(four, _mm_movehl_ps(four, four));
  return f(two, _mm_movehdup_ps(two))[0];
}
OPMUX_INLINE float reduce_add(Vec v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
OPMUX_INLINE float reduce_max(Vec v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

}  // namespace
}  // namespace opmux::cpu

#include "vec_convert.h"
#include "vec_math.h"
