// SPDX-License-Identifier: Apache-2.0
// Float32 to the 8-bit types of quantised tensors: clamped, rounded half to even.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

namespace opmux::gpu {

// Adding it leaves the integer nearest to a small float in the low bits of the sum.
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23

struct Fp8 {
  static constexpr float kTop = 448.0f;

  static __device__ uint32_t one(float v) { return fp8_bits(v); }

  // The low byte holds the first.
  static __device__ uint32_t four(float a, float b, float c, float d) {
    return fp8_pair_bits(a, b) | fp8_pair_bits(c, d) << 16;
  }
};

struct Int8 {
  static constexpr float kTop = 127.0f;

  // NaN is 0. The upper bits hold something else.
  static __device__ uint32_t low_byte(float v) {
    const float known = v == v ? v : 0.0f;
    return float_as_bits(fminf(fmaxf(known, -kTop), kTop) + kRoundToInteger);
  }
  static __device__ uint32_t one(float v) { return low_byte(v) & 0xffu; }
  static __device__ uint32_t four(float a, float b, float c, float d) {
    return one(a) | one(b) << 8 | one(c) << 16 | low_byte(d) << 24;
  }
};

}  // namespace opmux::gpu

#endif
