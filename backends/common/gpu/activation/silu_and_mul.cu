// SPDX-License-Identifier: Apache-2.0
// silu_and_mul(x) -> out: silu(x[..., :d]) * x[..., d:]
#include "activation/gated.h"
#include "math.cuh"

namespace opmux::gpu {

LaunchGated launch_silu_and_mul;

#if OPMUX_KERNEL
struct SiluAndMul {
  __device__ float operator()(float gate, float up) const { return gate * sigmoid(gate) * up; }
};
void launch_silu_and_mul(const GatedRows& rows, Stream stream) {
  launch_gated<SiluAndMul>("silu_and_mul", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void silu_and_mul(const Tensor& x, Tensor out) {
  gated("silu_and_mul", launch_silu_and_mul, x, out);
}
OPMUX_OP(silu_and_mul, silu_and_mul);
#endif

}  // namespace opmux::gpu
