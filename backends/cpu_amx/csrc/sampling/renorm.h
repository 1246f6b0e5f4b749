// SPDX-License-Identifier: Apache-2.0
// Writes what a threshold keeps of a row, divided by its mass.
#pragma once

#include "sampling/filter.h"

#if OPMUX_KERNEL
namespace opmux::cpu {
namespace {

template <class T>
inline void renormalise(const T* probs, int64_t size, const Cut& cut, float* out) {
  constexpr int64_t kBlock = 128;
  const float threshold = as_float(cut.key);
  // One rounding of the reciprocal in float64 more than a division: 2^-29 of a float32 ulp.
  const double scale = cut.mass > 0 ? 1 / cut.mass : 0;
  float value[kBlock] = {};
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = size - begin < kBlock ? size - begin : kBlock;
    Vec largest = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const int left = static_cast<int>(n - i);
      const Vec v =
          max(left >= kLanes ? load(probs + begin + i) : load(probs + begin + i, left), Vec{});
      largest = max(largest, v);
      store(value + i, v);
    }
    float* to = out + begin;
    if (reduce_max(largest) < threshold) {  // the usual case
      __builtin_memset(to, 0, sizeof(float) * static_cast<size_t>(n));
      continue;
    }
    for (int64_t i = 0; i < kBlock; ++i) {
      const float kept = static_cast<float>(static_cast<double>(value[i]) * scale);
      value[i] = value[i] >= threshold ? kept : 0.0f;
    }
    __builtin_memcpy(to, value, sizeof(float) * static_cast<size_t>(n));
  }
}

}  // namespace
}  // namespace opmux::cpu
#endif
