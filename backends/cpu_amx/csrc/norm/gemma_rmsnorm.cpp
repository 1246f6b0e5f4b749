// SPDX-License-Identifier: Apache-2.0
// gemma_rmsnorm(x, weight, eps) -> out: x / sqrt(mean(x^2) + eps) * (1 + weight)
#include "norm/rmsnorm.h"

namespace opmux::cpu {
namespace {

#if OPMUX_KERNEL
template <class T>
void gemma_rmsnorm_rows(const NormRows& rows) {
  norm_rows<T>(rows, gemma_weight);
}
#endif

OPMUX_FLOAT_KERNELS(gemma_rmsnorm_kernels, NormKernel, gemma_rmsnorm_rows);

#if OPMUX_LAUNCHER
void gemma_rmsnorm(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
  launch_norm("gemma_rmsnorm", gemma_rmsnorm_kernels, x, weight, eps, out);
}
OPMUX_OP(gemma_rmsnorm, gemma_rmsnorm);
#endif

}  // namespace
}  // namespace opmux::cpu
