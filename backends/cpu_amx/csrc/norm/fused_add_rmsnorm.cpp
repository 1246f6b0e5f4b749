// SPDX-License-Identifier: Apache-2.0
// fused_add_rmsnorm(x, residual, weight, eps), in place: s = x + residual; residual = s;
// x = s / sqrt(mean(s^2) + eps) * weight, from s before it is rounded
#include "norm/rmsnorm.h"

namespace opmux::cpu {
namespace {

#if OPMUX_KERNEL
template <class T>
void fused_add_rmsnorm_rows(const AddNormRows& rows) {
  add_norm_rows<T>(rows, plain_weight);
}
#endif

OPMUX_FLOAT_KERNELS(fused_add_rmsnorm_kernels, AddNormKernel, fused_add_rmsnorm_rows);

#if OPMUX_LAUNCHER
void fused_add_rmsnorm(Tensor x, Tensor residual, const Tensor& weight, double eps) {
  launch_add_norm("fused_add_rmsnorm", fused_add_rmsnorm_kernels, x, residual, weight, eps);
}
OPMUX_OP(fused_add_rmsnorm, fused_add_rmsnorm);
#endif

}  // namespace
}  // namespace opmux::cpu
