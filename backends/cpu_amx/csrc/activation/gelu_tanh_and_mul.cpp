// SPDX-License-Identifier: Apache-2.0
// gelu_tanh_and_mul(x) -> out: gelu(x[..., :d]) * x[..., d:], the tanh approximation of gelu
#include "activation/gated.h"

namespace opmux::cpu {
namespace {

#if OPMUX_KERNEL
template <class T>
void gelu_tanh_and_mul_rows(const GatedRows& rows) {
  map_gated<T>(rows, [](Vec gate, Vec up) {
    // (1 + tanh(u)) / 2 = sigmoid(2u), without the cancellation; 2 * sqrt(2 / pi) = 1.5957...
    const Vec twice_u = 1.59576912f * gate * fma(gate * gate, 0.044715f, 1.0f);
    return times_sigmoid<T>(gate, twice_u) * up;
  });
}
#endif

OPMUX_FLOAT_KERNELS(gelu_tanh_and_mul_kernels, GatedKernel, gelu_tanh_and_mul_rows);

#if OPMUX_LAUNCHER
void gelu_tanh_and_mul(const Tensor& x, Tensor out) {
  launch_gated("gelu_tanh_and_mul", gelu_tanh_and_mul_kernels, x, out);
}
OPMUX_OP(gelu_tanh_and_mul, gelu_tanh_and_mul);
#endif

}  // namespace
}  // namespace opmux::cpu
