// SPDX-License-Identifier: Apache-2.0
// Reductions over lanes and blocks, right for any warp width. Each is the same tree for the same
// number of threads, so a row's result does not depend on the rows around it.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

namespace opmux::gpu {

constexpr int kMaxWarps = kMaxThreads / 32;  // with the narrowest warps

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Over aligned groups of kLanes lanes, a power of two up to kWarp. All lanes of the warp call it;
// every lane of a group holds the group's result.
template <int kLanes, class T, class F>
__device__ inline T reduce_lanes(T value, const F& f) {
  static_assert(kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0);
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value = f(value, shuffle_xor(value, mask));
  return value;
}

// 2^n - 1 for the smallest 2^n lanes that hold `count` values.
__device__ constexpr int last_lane(int count) {
  int last = kWarp - 1;
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    if (count <= lanes) last = lanes - 1;
  }
  return last;
}

// Over the block, of kThreads threads where that is not 0. All its threads call it; every thread
// holds the result. `scratch` may be used again after the next barrier.
template <int kThreads = 0, class T, class F>
__device__ inline T reduce_block(T value, T identity, const F& f, Shared<T, kMaxWarps>& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = (kThreads > 0 ? kThreads : static_cast<int>(blockDim.x)) / kWarp;
  value = reduce_lanes<kWarp>(value, f);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  const int last = last_lane(warps), from = lane & last;
  value = from < warps ? scratch[from] : identity;
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    if (mask <= last) value = f(value, shuffle_xor(value, mask));
  }
  return value;
}

// Inclusive sums over the lanes of a warp, in lane order. All lanes call it.
template <class T>
__device__ inline T scan_lanes(T value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T before = shuffle_up(value, distance);
    if (lane >= distance) value = before + value;
  }
  return value;
}

// The sum over the threads of the block that come before. All threads call it; `scratch` may be
// used again after the next barrier.
template <class T>
__device__ inline T sum_before(T value, Shared<T, kMaxWarps>& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const T inclusive = scan_lanes(value);
  if (lane == kWarp - 1) scratch[warp] = inclusive;
  __syncthreads();
  const T totals = scan_lanes(lane < warps ? static_cast<T>(scratch[lane]) : T{});
  const T warps_before = shuffle(totals, warp > 0 ? warp - 1 : 0);
  const T lanes_before = shuffle_up(inclusive, 1);
  return (warp > 0 ? warps_before : T{}) + (lane > 0 ? lanes_before : T{});
}

// The same, with the thread's own value.
template <class T>
__device__ inline T scan_block(T value, Shared<T, kMaxWarps>& scratch) {
  return sum_before(value, scratch) + value;
}

}  // namespace opmux::gpu

#endif
