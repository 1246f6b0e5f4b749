// SPDX-License-Identifier: Apache-2.0
// gelu_and_mul(x) -> out: gelu(x[..., :d]) * x[..., d:], gelu by erf
#include "activation/gated.h"
#include "math.cuh"

namespace opmux::gpu {

LaunchGated launch_gelu_and_mul;

#if OPMUX_KERNEL
struct GeluAndMul {
  __device__ float operator()(float gate, float up) const { return gelu(gate) * up; }
};
void launch_gelu_and_mul(const GatedRows& rows, Stream stream) {
  launch_gated<GeluAndMul>("gelu_and_mul", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void gelu_and_mul(const Tensor& x, Tensor out) {
  gated("gelu_and_mul", launch_gelu_and_mul, x, out);
}
OPMUX_OP(gelu_and_mul, gelu_and_mul);
#endif

}  // namespace opmux::gpu
