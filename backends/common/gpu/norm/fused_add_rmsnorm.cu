// SPDX-License-Identifier: Apache-2.0
// fused_add_rmsnorm(x, residual, weight, eps), in place: s = x + residual; residual = s;
// x = s / sqrt(mean(s^2) + eps) * weight, from s before it is rounded
#include "norm/norm_kernels.cuh"

namespace opmux::gpu {

LaunchNorm launch_fused_add_rmsnorm;

#if OPMUX_KERNEL
void launch_fused_add_rmsnorm(const NormRows& rows, Stream stream) {
  launch_norm<true, PlainWeight>("fused_add_rmsnorm", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void fused_add_rmsnorm(Tensor x, Tensor residual, const Tensor& weight, double eps) {
  add_norm("fused_add_rmsnorm", launch_fused_add_rmsnorm, x, residual, weight, eps);
}
OPMUX_OP(fused_add_rmsnorm, fused_add_rmsnorm);
#endif

}  // namespace opmux::gpu
