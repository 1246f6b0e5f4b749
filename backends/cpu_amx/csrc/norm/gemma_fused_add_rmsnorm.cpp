// SPDX-License-Identifier: Apache-2.0
// gemma_fused_add_rmsnorm(x, residual, weight, eps), in place: s = x + residual; residual = s;
// x = s / sqrt(mean(s^2) + eps) * (1 + weight), from s before it is rounded
#include "norm/rmsnorm.h"

namespace opmux::cpu {
namespace {

#if OPMUX_KERNEL
template <class T>
void gemma_fused_add_rmsnorm_rows(const AddNormRows& rows) {
  add_norm_rows<T>(rows, gemma_weight);
}
#endif

OPMUX_FLOAT_KERNELS(gemma_fused_add_rmsnorm_kernels, AddNormKernel, gemma_fused_add_rmsnorm_rows);

#if OPMUX_LAUNCHER
void gemma_fused_add_rmsnorm(Tensor x, Tensor residual, const Tensor& weight, double eps) {
  launch_add_norm("gemma_fused_add_rmsnorm", gemma_fused_add_rmsnorm_kernels, x, residual, weight,
                  eps);
}
OPMUX_OP(gemma_fused_add_rmsnorm, gemma_fused_add_rmsnorm);
#endif

}  // namespace
}  // namespace opmux::cpu
