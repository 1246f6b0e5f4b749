// SPDX-License-Identifier: Apache-2.0
// Float32 to e4m3 for devices without an instruction.
#pragma once

#include <cstdint>

namespace opmux::gpu {

// e4m3 in integer arithmetic, for devices without an instruction. NaN stays NaN.
__device__ inline uint32_t fp8_bits(float v) {
  const uint32_t bits = float_as_bits(v);
  const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fu;
  if (magnitude >= 0x43e00000u) return sign | 0x7eu;  // 448
  if (magnitude < 0x3c800000u) {                      // 2^-6: steps of 2^-9, which are 2^14's
    constexpr float kStep = 16384.0f;
    return sign | (float_as_bits(bits_as_float(magnitude) + kStep) - float_as_bits(kStep));
  }
  const uint32_t even = magnitude >> 20 & 1u;
  return sign | (((magnitude + 0x7ffffu + even) >> 20) - (120u << 3));
}

}  // namespace opmux::gpu
