// SPDX-License-Identifier: Apache-2.0
// gemma_rmsnorm(x, weight, eps) -> out: x / sqrt(mean(x^2) + eps) * (1 + weight)
#include "norm/norm_kernels.cuh"

namespace opmux::gpu {

LaunchNorm launch_gemma_rmsnorm;

#if OPMUX_KERNEL
void launch_gemma_rmsnorm(const NormRows& rows, Stream stream) {
  launch_norm<false, GemmaWeight>("gemma_rmsnorm", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void gemma_rmsnorm(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
  norm("gemma_rmsnorm", launch_gemma_rmsnorm, x, weight, eps, out);
}
OPMUX_OP(gemma_rmsnorm, gemma_rmsnorm);
#endif

}  // namespace opmux::gpu
