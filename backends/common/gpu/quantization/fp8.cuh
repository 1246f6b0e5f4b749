// SPDX-License-Identifier: Apache-2.0
// Float32 to the 8-bit types of quantised tensors: clamped, rounded half to even.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

namespace opmux::gpu {

struct Fp8 {
  static constexpr float kTop = 448.0f;

  static __device__ uint32_t one(float v) { return fp8_bits(v); }
  // The low byte holds the first.
  static __device__ uint32_t four(float a, float b, float c, float d) {
    return fp8_four_bits(a, b, c, d);
  }
};

struct Int8 {
  static constexpr float kTop = 127.0f;

  static __device__ uint32_t one(float v) { return int8_bits(v); }
  static __device__ uint32_t four(float a, float b, float c, float d) {
    return int8_four_bits(a, b, c, d);
  }
};

}  // namespace opmux::gpu

#endif
