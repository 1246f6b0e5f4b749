// SPDX-License-Identifier: Apache-2.0
// Functions that activations share, right at infinities, NaN and overflow.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL
namespace opmux::gpu {

// exp(-v) overflows to infinity below -88, which gives the right 0. The exact exp and division
// would cost more than the memory traffic; what the fast ones lose, 1e-5 of a tail that is itself
// below 1e-20, no result shows.
__device__ inline float sigmoid(float v) { return divide_fast(1.0f, 1.0f + exp_fast(-v)); }

__device__ inline float gelu(float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); }

// (1 + tanh(u)) / 2 is sigmoid(2 * u)
__device__ inline float gelu_tanh(float v) {
  return v * sigmoid(1.5957691f * (v + 0.044715f * v * v * v));
}

}  // namespace opmux::gpu
#endif
