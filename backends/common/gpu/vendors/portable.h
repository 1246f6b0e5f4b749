// SPDX-License-Identifier: Apache-2.0
// What vendors without better have: plain stores, and conversions by integer operations.
#pragma once

#include <cstdint>

#include "types.h"

namespace opmux::gpu {

constexpr int kResidentThreads = 2048;  // of a multiprocessor

// In global memory.
template <class W>
__device__ inline void store_word(W* to, W value) {
  *to = value;
}

// Before wait_for_previous(), where a kernel may begin before the one before it has ended.
__device__ inline void prefetch(const void*) {}

__device__ inline float bits_as_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
}
__device__ inline uint32_t float_as_bits(float v) {
  union {
    float value;
    uint32_t bits;
  } both = {v};
  return both.bits;
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bfloat16 v) {
  return bits_as_float(static_cast<uint32_t>(v.bits) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
__device__ inline bfloat16 to_bfloat16(float v) {
  const uint32_t bits = float_as_bits(v);
  if (v != v) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline bfloat16 from_float<bfloat16>(float v) {
  return to_bfloat16(v);
}
template <>
__device__ inline float16 from_float<float16>(float v);  // the vendor's

// Two at once; the low half holds the first.
template <class T>
__device__ inline uint32_t pair_bits(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

}  // namespace opmux::gpu
