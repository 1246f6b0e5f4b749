// SPDX-License-Identifier: Apache-2.0
// Float32 to the 8-bit types in integer arithmetic, for devices without an instruction. They
// saturate and round half to even; NaN stays NaN, and is 0 as an integer.
#pragma once

#include <cstdint>

namespace opmux::gpu {

// e4m3
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

__device__ inline uint32_t fp8_e5m2_bits(float v) {
  const uint32_t bits = float_as_bits(v);
  const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fu;
  if (magnitude >= 0x47600000u) return sign | 0x7bu;  // 57344
  if (magnitude < 0x38800000u) {                      // 2^-14: steps of 2^-16, which are 2^7's
    constexpr float kStep = 128.0f;
    return sign | (float_as_bits(bits_as_float(magnitude) + kStep) - float_as_bits(kStep));
  }
  const uint32_t even = magnitude >> 21 & 1u;
  return sign | (((magnitude + 0xfffffu + even) >> 21) - (112u << 2));
}

// Between -127 and 127.
__device__ inline uint32_t int8_bits(float v) {
  constexpr float kTop = 127.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: leaves the nearest integer in the low bits
  const float known = v == v ? v : 0.0f;
  return float_as_bits(fminf(fmaxf(known, -kTop), kTop) + kRound) & 0xffu;
}

}  // namespace opmux::gpu
