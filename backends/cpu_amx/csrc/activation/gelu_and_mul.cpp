// SPDX-License-Identifier: Apache-2.0
// gelu_and_mul(x) -> out: gelu(x[..., :d]) * x[..., d:], the exact gelu
#include "activation/gated.h"

namespace opmux::cpu {
namespace {

#if OPMUX_KERNEL
template <class T>
void gelu_and_mul_rows(const GatedRows& rows) {
  map_gated<T>(rows, [](Vec gate, Vec up) { return gate * normal_cdf<T>(gate) * up; });
}
#endif

OPMUX_FLOAT_KERNELS(gelu_and_mul_kernels, GatedKernel, gelu_and_mul_rows);

#if OPMUX_LAUNCHER
void gelu_and_mul(const Tensor& x, Tensor out) {
  launch_gated("gelu_and_mul", gelu_and_mul_kernels, x, out);
}
OPMUX_OP(gelu_and_mul, gelu_and_mul);
#endif

}  // namespace
}  // namespace opmux::cpu
