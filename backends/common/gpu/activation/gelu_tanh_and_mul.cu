// SPDX-License-Identifier: Apache-2.0
// gelu_tanh_and_mul(x) -> out: gelu(x[..., :d]) * x[..., d:], gelu by tanh
#include "activation/gated.h"
#include "math.cuh"

namespace opmux::gpu {

LaunchGated launch_gelu_tanh_and_mul;

#if OPMUX_KERNEL
struct GeluTanhAndMul {
  __device__ float operator()(float gate, float up) const { return gelu_tanh(gate) * up; }
};
void launch_gelu_tanh_and_mul(const GatedRows& rows, Stream stream) {
  launch_gated<GeluTanhAndMul>("gelu_tanh_and_mul", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void gelu_tanh_and_mul(const Tensor& x, Tensor out) {
  gated("gelu_tanh_and_mul", launch_gelu_tanh_and_mul, x, out);
}
OPMUX_OP(gelu_tanh_and_mul, gelu_tanh_and_mul);
#endif

}  // namespace opmux::gpu
