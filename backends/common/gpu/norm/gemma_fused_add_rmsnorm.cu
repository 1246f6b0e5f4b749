// SPDX-License-Identifier: Apache-2.0
// gemma_fused_add_rmsnorm(x, residual, weight, eps), in place: s = x + residual; residual = s;
// x = s / sqrt(mean(s^2) + eps) * (1 + weight), from s before it is rounded
#include "norm/norm_kernels.cuh"

namespace opmux::gpu {

LaunchNorm launch_gemma_fused_add_rmsnorm;

#if OPMUX_KERNEL
void launch_gemma_fused_add_rmsnorm(const NormRows& rows, Stream stream) {
  launch_norm<true, GemmaWeight>("gemma_fused_add_rmsnorm", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void gemma_fused_add_rmsnorm(Tensor x, Tensor residual, const Tensor& weight, double eps) {
  add_norm("gemma_fused_add_rmsnorm", launch_gemma_fused_add_rmsnorm, x, residual, weight, eps);
}
OPMUX_OP(gemma_fused_add_rmsnorm, gemma_fused_add_rmsnorm);
#endif

}  // namespace opmux::gpu
