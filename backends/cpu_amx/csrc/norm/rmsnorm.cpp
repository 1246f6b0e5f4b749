// SPDX-License-Identifier: Apache-2.0
// rmsnorm(x, weight, eps) -> out: x / sqrt(mean(x^2) + eps) * weight
#include "norm/rmsnorm.h"

namespace opmux::cpu {
namespace {

#if OPMUX_KERNEL
template <class T>
void rmsnorm_rows(const NormRows& rows) {
  norm_rows<T>(rows, plain_weight);
}
#endif

OPMUX_FLOAT_KERNELS(rmsnorm_kernels, NormKernel, rmsnorm_rows);

#if OPMUX_LAUNCHER
void rmsnorm(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
  launch_norm("rmsnorm", rmsnorm_kernels, x, weight, eps, out);
}
OPMUX_OP(rmsnorm, rmsnorm);
#endif

}  // namespace
}  // namespace opmux::cpu
