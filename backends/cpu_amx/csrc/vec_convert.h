// SPDX-License-Identifier: Apache-2.0
// Loads and stores, part of vec.h. A Pair is the unit of a kernel's loop: 2 * kLanes consecutive
// elements, one full register of a 16-bit type. Its lanes come in an order that depends on the
// type alone (even and odd elements for bfloat16, where a shift and a mask convert them), so an
// elementwise kernel loads, computes and stores without a shuffle.
#pragma once

namespace opmux::cpu {
namespace {

constexpr int kPair = 2 * kLanes;

struct Pair {
  Vec a, b;
};

// Stands for a count of kPair, known at compile time.
struct Full {};

#if defined(__AVX512F__)
using Raw = __m512i;      // kPair 16-bit elements
using HalfRaw = __m256i;  // kLanes of them
#elif defined(__AVX2__)
using Raw = __m256i;
using HalfRaw = __m128i;
#else
using Raw = __m128i;
using HalfRaw = int64_t;
#endif

template <class To, class From>
OPMUX_INLINE To load_raw(const From* p) {
  To value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

// The first n of a register's worth of elements; the others are zero. Nothing past the end is
// touched: masked where the ISA can, else through a buffer.
template <class Register, class T>
OPMUX_INLINE Register load_part(const T* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << n) - 1);
  if constexpr (sizeof(Register) == 64 && sizeof(T) == 4) {
    return (Register)_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), p);
  } else if constexpr (sizeof(Register) == 64) {
    return (Register)_mm512_maskz_loadu_epi16(mask, p);
  } else {
    return (Register)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
  }
#else
  T buffer[sizeof(Register) / sizeof(T)] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load_raw<Register>(buffer);
#endif
}

template <class Register, class T>
OPMUX_INLINE void store_part(T* p, Register value, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << n) - 1);
  if constexpr (sizeof(Register) == 64 && sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(mask), (__m512i)value);
  } else if constexpr (sizeof(Register) == 64) {
    _mm512_mask_storeu_epi16(p, mask, (__m512i)value);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), (__m256i)value);
  }
#else
  T buffer[sizeof(Register) / sizeof(T)];
  __builtin_memcpy(buffer, &value, sizeof value);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
#endif
}

// float32 -> bfloat16 in the upper half of each lane; the lower half is not cleared. Rounding could
// carry a NaN into an infinity or a zero, so every NaN becomes all ones.
OPMUX_INLINE VecI round_bf16(Vec v) {
  const VecI bits = bits_of(v);
#if defined(__AVX512F__)
  const __m512i raw = (__m512i)bits;
  const __mmask16 odd = _mm512_test_epi32_mask(raw, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(raw, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(down, odd, raw, _mm512_set1_epi32(0x8000));
  return v == v ? (VecI)rounded : splat(-1);
#else
  return (bits + 0x7fff + ((bits >> 16) & 1)) | (v != v);
#endif
}

// ---- float16 without F16C (x86_64_v2), four lanes in the low halves of 32-bit lanes
#if !defined(__F16C__)
OPMUX_INLINE Vec widen_f16(VecI half) {
  const VecI sign = (half & 0x8000) << 16;
  const VecI magnitude = (half & 0x7fff) << 13;
  const VecI exponent = magnitude & 0x0f800000;
  const VecI normal = magnitude + (112 << 23);  // 112: difference of the exponents' biases
  // Infinity and NaN: exponent all ones; a signalling NaN becomes quiet, as the instruction does.
  const VecI special =
      (magnitude | 0x7f800000) | ((magnitude & 0x007fffff) != 0 ? splat(0x00400000) : splat(0));
  // Subnormal: as if normal with exponent 1, less the implicit bit that it does not have.
  const Vec subnormal = from_bits(magnitude + (113 << 23)) - from_bits(splat(113 << 23));
  const VecI value = exponent == 0 ? bits_of(subnormal) : exponent == 0x0f800000 ? special : normal;
  return from_bits(value | sign);
}
OPMUX_INLINE VecI narrow_f16(Vec v) {
  const VecI bits = bits_of(v);
  const VecI sign = (bits >> 16) & 0x8000;
  const VecI magnitude = bits & 0x7fffffff;
  const VecI normal = (magnitude - (112 << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 adding 0.5 leaves the rounded float16 subnormal in the low bits of the sum.
  const VecI subnormal = bits_of(from_bits(magnitude) + splat(0.5f)) - (126 << 23);
  const VecI nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const VecI value = magnitude > 0x7f800000    ? nan
                     : magnitude >= 0x477ff000 ? splat(0x7c00)  // rounds beyond 65504
                     : magnitude < (113 << 23) ? subnormal
                                               : normal;
  return value | sign;
}
#endif

// ---- one register of float32 from or to kLanes 16-bit elements in order
OPMUX_INLINE Vec widen(bfloat16, HalfRaw raw) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
  return (Vec)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128(raw));
#endif
}
OPMUX_INLINE Vec widen(float16, HalfRaw raw) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(raw);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(raw);
#else
  return widen_f16((VecI)_mm_cvtepu16_epi32(_mm_cvtsi64_si128(raw)));
#endif
}
OPMUX_INLINE HalfRaw narrow_low_halves(VecI v) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return _mm_cvtsi128_si64(_mm_packus_epi32((__m128i)v, (__m128i)v));
#endif
}
OPMUX_INLINE HalfRaw narrow(bfloat16, Vec v) {
  return narrow_low_halves((round_bf16(v) >> 16) & 0xffff);
}
OPMUX_INLINE HalfRaw narrow(float16, Vec v) {
#if defined(__AVX512F__)
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
  return narrow_low_halves(narrow_f16(v));
#endif
}

// ---- kLanes elements, in order
template <class T>
OPMUX_INLINE Vec load(const T* p) {
  return widen(T{}, load_raw<HalfRaw>(p));
}
template <>
OPMUX_INLINE Vec load(const float* p) {
  return load_raw<Vec>(p);
}
template <class T>
OPMUX_INLINE Vec load(const T* p, int n) {  // 0 <= n <= kLanes; the other lanes are zero
  return widen(T{}, load_part<HalfRaw>(p, n));
}
template <>
OPMUX_INLINE Vec load(const float* p, int n) {
  return load_part<Vec>(p, n);
}
template <class T>
OPMUX_INLINE void store(T* p, Vec v) {
  const HalfRaw raw = narrow(T{}, v);
  __builtin_memcpy(p, &raw, sizeof raw);
}
template <>
OPMUX_INLINE void store(float* p, Vec v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
OPMUX_INLINE void store(T* p, Vec v, int n) {
  store_part(p, narrow(T{}, v), n);
}
template <>
OPMUX_INLINE void store(float* p, Vec v, int n) {
  store_part(p, v, n);
}

// ---- kPair elements
OPMUX_INLINE Raw join(HalfRaw low, HalfRaw high) {
#if defined(__AVX512F__)
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#elif defined(__AVX2__)
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
#else
  return _mm_set_epi64x(high, low);
#endif
}
OPMUX_INLINE Pair split(bfloat16, Raw raw) {
  const VecI bits = (VecI)raw;
  return {from_bits(bits << 16), from_bits(bits & static_cast<int32_t>(0xffff0000))};
}
OPMUX_INLINE Pair split(float16, Raw raw) {
  HalfRaw half[2];
  __builtin_memcpy(half, &raw, sizeof raw);
  return {widen(float16{}, half[0]), widen(float16{}, half[1])};
}
#if defined(__AVX512BF16__)
// 40 % less time for a whole silu_and_mul than the roundings below. The instruction takes and gives
// zero for magnitudes under 2^-126, where the other ISAs give subnormals.
OPMUX_INLINE Raw merge(bfloat16, Pair v) {
  using Words = int16_t __attribute__((vector_size(64)));
  Words order;
  for (int i = 0; i < kPair; ++i) order[i] = static_cast<int16_t>(i / 2 + i % 2 * kLanes);
  return _mm512_permutexvar_epi16((Raw)order, (Raw)_mm512_cvtne2ps_pbh(v.b, v.a));
}
#else
OPMUX_INLINE Raw merge(bfloat16, Pair v) {
  using VecU = uint32_t __attribute__((vector_size(kLanes * 4)));
  const VecI even = (VecI)((VecU)round_bf16(v.a) >> 16);
  return (Raw)(even | (round_bf16(v.b) & static_cast<int32_t>(0xffff0000)));
}
#endif
OPMUX_INLINE Raw merge(float16, Pair v) {
  return join(narrow(float16{}, v.a), narrow(float16{}, v.b));
}

template <class T>
OPMUX_INLINE Pair load_pair(const T* p) {
  return split(T{}, load_raw<Raw>(p));
}
template <>
OPMUX_INLINE Pair load_pair(const float* p) {
  return {load(p), load(p + kLanes)};
}
template <class T>
OPMUX_INLINE Pair load_pair(const T* p, int n) {  // 0 <= n <= kPair; the other lanes are zero
  return split(T{}, load_part<Raw>(p, n));
}
template <>
OPMUX_INLINE Pair load_pair(const float* p, int n) {
  if (n < kLanes) return {load(p, n), Vec{}};
  return {load(p), load(p + kLanes, n - kLanes)};
}

template <class T>
OPMUX_INLINE Pair load_pair(const T* p, Full) {
  return load_pair(p);
}

// kStream: past the caches, for results that nothing reads soon and that would evict what is
// still needed; the memory then is not read before it is overwritten. p must be aligned to a
// register, and stream_fence() must follow before another thread looks.
template <bool kStream>
OPMUX_INLINE void store_raw(void* p, Raw raw) {
  if constexpr (kStream) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(p), raw);
#elif defined(__AVX2__)
    _mm256_stream_si256(static_cast<__m256i*>(p), raw);
#else
    _mm_stream_si128(static_cast<__m128i*>(p), raw);
#endif
  } else {
    __builtin_memcpy(p, &raw, sizeof raw);
  }
}
template <bool kStream = false, class T>
OPMUX_INLINE void store_pair(T* p, Pair v) {
  store_raw<kStream>(p, merge(T{}, v));
}
template <bool kStream = false>
OPMUX_INLINE void store_pair(float* p, Pair v) {
  store_raw<kStream>(p, (Raw)v.a);
  store_raw<kStream>(p + kLanes, (Raw)v.b);
}
template <class T>
OPMUX_INLINE void store_pair(T* p, Pair v, int n) {
  store_part(p, merge(T{}, v), n);
}
template <>
OPMUX_INLINE void store_pair(float* p, Pair v, int n) {
  if (n < kLanes) {
    store(p, v.a, n);
  } else {
    store(p, v.a);
    store(p + kLanes, v.b, n - kLanes);
  }
}

template <class T>
OPMUX_INLINE void store_pair(T* p, Pair v, Full) {
  store_pair(p, v);
}

// ---- pairs of elements (2i, 2i + 1)
// {even, odd} elements of consecutive ones, and back.
OPMUX_INLINE Pair deinterleave(Pair v) {
  VecI even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  return {__builtin_shuffle(v.a, v.b, even), __builtin_shuffle(v.a, v.b, even + 1)};
}
OPMUX_INLINE Pair interleave(Pair v) {
  VecI order;
  for (int i = 0; i < kLanes; ++i) order[i] = i / 2 + i % 2 * kLanes;
  return {__builtin_shuffle(v.a, v.b, order), __builtin_shuffle(v.a, v.b, order + kLanes / 2)};
}
// From the lane order of load_pair<T> to {even, odd} and back.
template <class T>
OPMUX_INLINE Pair to_even_odd(T, Pair v) {
  return deinterleave(v);
}
OPMUX_INLINE Pair to_even_odd(bfloat16, Pair v) { return v; }
template <class T>
OPMUX_INLINE Pair from_even_odd(T, Pair v) {
  return interleave(v);
}
OPMUX_INLINE Pair from_even_odd(bfloat16, Pair v) { return v; }
// From consecutive elements to the lane order of load_pair<T> and back.
template <class T>
OPMUX_INLINE Pair from_consecutive(T, Pair v) {
  return v;
}
OPMUX_INLINE Pair from_consecutive(bfloat16, Pair v) { return deinterleave(v); }
template <class T>
OPMUX_INLINE Pair to_consecutive(T, Pair v) {
  return v;
}
OPMUX_INLINE Pair to_consecutive(bfloat16, Pair v) { return interleave(v); }

// Elements from p up to the next register boundary: what to do before store_pair<true>.
template <class T>
OPMUX_INLINE int64_t until_aligned(const T* p) {
  const size_t offset = reinterpret_cast<uintptr_t>(p) % sizeof(Raw);
  return static_cast<int64_t>(offset == 0 ? 0 : (sizeof(Raw) - offset) / sizeof(T));
}
OPMUX_INLINE void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace opmux::cpu
