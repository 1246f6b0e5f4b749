// SPDX-License-Identifier: Apache-2.0
// rmsnorm(x, weight, eps) -> out: x / sqrt(mean(x^2) + eps) * weight
#include "norm/norm_kernels.cuh"

namespace opmux::gpu {

LaunchNorm launch_rmsnorm;

#if OPMUX_KERNEL
void launch_rmsnorm(const NormRows& rows, Stream stream) {
  launch_norm<false, PlainWeight>("rmsnorm", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void rmsnorm(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
  norm("rmsnorm", launch_rmsnorm, x, weight, eps, out);
}
OPMUX_OP(rmsnorm, rmsnorm);
#endif

}  // namespace opmux::gpu
