// SPDX-License-Identifier: Apache-2.0
// Numbers over the lanes that share a row: 32 on every device, whatever the width of its warps.
#pragma once

#include "reduce.cuh"

namespace opmux::gpu {

constexpr int kRowLanes = 32;

__device__ inline uint32_t row_max(uint32_t value) { return max_of_32_lanes(value); }
__device__ inline uint32_t row_min(uint32_t value) { return min_of_32_lanes(value); }

// An integer that orders as the float does: -0 equals 0, and none is 0, which stands for no value.
__device__ inline uint32_t ordered(float v) {
  const uint32_t bits = float_as_bits(v + 0.0f);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return key > 0 ? key : 1;
}
__device__ inline float unordered(uint32_t key) {
  return bits_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

}  // namespace opmux::gpu
