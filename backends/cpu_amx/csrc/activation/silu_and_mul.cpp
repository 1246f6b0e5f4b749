// SPDX-License-Identifier: Apache-2.0
// silu_and_mul(x) -> out: silu(x[..., :d]) * x[..., d:]
#include "activation/gated.h"

namespace opmux::cpu {
namespace {

#if OPMUX_KERNEL
template <class T>
void silu_and_mul_rows(const GatedRows& rows) {
  map_gated<T>(rows, [](Vec gate, Vec up) { return silu<T>(gate) * up; });
}
#endif

OPMUX_FLOAT_KERNELS(silu_and_mul_kernels, GatedKernel, silu_and_mul_rows);

#if OPMUX_LAUNCHER
void silu_and_mul(const Tensor& x, Tensor out) {
  launch_gated("silu_and_mul", silu_and_mul_kernels, x, out);
}
OPMUX_OP(silu_and_mul, silu_and_mul);
#endif

}  // namespace
}  // namespace opmux::cpu
