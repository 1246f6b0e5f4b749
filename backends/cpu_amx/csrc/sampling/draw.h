// SPDX-License-Identifier: Apache-2.0
// Draws a token of what a threshold keeps of a row.
#pragma once

#include "kernel.h"

#if OPMUX_KERNEL
namespace opmux::cpu {
namespace {

// Bit i is set where lane i of a comparison holds.
OPMUX_INLINE uint32_t lanes_of(VecI condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)condition));
#else
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)condition));
#endif
}

// Calls f(index, value) for what stays in [begin, end), in order, until it returns false.
template <class T, class F>
OPMUX_INLINE void for_kept(const T* probs, int64_t begin, int64_t end, float threshold,
                           const F& f) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec v = end - i >= kLanes ? load(probs + i) : load(probs + i, static_cast<int>(end - i));
    uint32_t kept = lanes_of((v >= threshold) & (v > 0));
    if (kept == 0) continue;
    float value[kLanes];
    store(value, v);
    for (; kept != 0; kept &= kept - 1) {
      const int lane = __builtin_ctz(kept);
      if (!f(i + lane, static_cast<double>(value[lane]))) return;
    }
  }
}

// The first index whose running kept mass exceeds `uniform` of the total, -1 if there is no mass.
// The masses are added one by one in the order of the row, as the definition does.
template <class T>
inline int32_t draw(const T* probs, int64_t size, float threshold, double uniform) {
  constexpr int64_t kBlocks = 64;
  const int64_t block = (size + kBlocks * kLanes - 1) / (kBlocks * kLanes) * kLanes;
  double before[kBlocks];  // the running mass at the start of each block
  int64_t blocks = 0, last = -1;
  double running = 0;
  for (int64_t begin = 0; begin < size; begin += block) {
    before[blocks++] = running;
    for_kept(probs, begin, begin + block < size ? begin + block : size, threshold,
             [&](int64_t index, double value) {
               running += value;
               last = index;
               return true;
             });
  }
  const double target = uniform * running;
  if (!(running > target)) return static_cast<int32_t>(last);  // uniform is 1, or a mass infinite
  int64_t b = blocks - 1;
  while (b > 0 && before[b] > target) --b;
  running = before[b];
  int64_t token = last;
  for_kept(probs, b * block, size, threshold, [&](int64_t index, double value) {
    running += value;
    token = index;
    return !(running > target);
  });
  return static_cast<int32_t>(token);
}

}  // namespace
}  // namespace opmux::cpu
#endif
