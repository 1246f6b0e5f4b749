// SPDX-License-Identifier: Apache-2.0
// Functions that activations share, right at infinities, NaN and overflow.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL
namespace opmux::gpu {

// exp(-v) overflows to infinity below -88, which gives the right 0. The exact exp and division
// would cost more than the memory traffic; what the fast ones lose, 1e-5 of a tail that is itself
// below 1e-20, no result shows.
__device__ inline float sigmoid(float v) {
  constexpr float kLog2E = 1.44269504f;
  return divide_fast(1.0f, 1.0f + exp2_fast(-kLog2E * v));
}

// v * Phi(v), with Phi(-|v|) = 2^p(|v|): log2 of the tail is smooth enough for a polynomial, where
// erff costs three times the instructions and gelu_and_mul would not run at memory speed. Minimax
// on [0, 6], relative error 3e-6 (6e-6 in float32); further out p only falls, so that Phi goes to 0
// or 1, and -inf gives NaN like the definition.
__device__ inline float gelu(float v) {
  constexpr float kP[] = {-0.999995291f,  -1.15125108f,     -0.458464384f,  -0.0539600737f,
                          0.00850789249f, -0.000930525304f, 6.15983517e-5f, -1.8348145e-6f};
  const float size = fabsf(v);
  float p = kP[7];
#pragma unroll
  for (int i = 6; i >= 0; --i) p = fmaf(p, size, kP[i]);
  const float tail = exp2_fast(p);
  return v * (v < 0.0f ? tail : 1.0f - tail);
}

// (1 + tanh(u)) / 2 is sigmoid(2 * u)
__device__ inline float gelu_tanh(float v) {
  return v * sigmoid(1.5957691f * (v + 0.044715f * v * v * v));
}

}  // namespace opmux::gpu
#endif
