// SPDX-License-Identifier: Apache-2.0
// fused_add_rmsnorm_per_token_quant(x, residual, weight, eps, int8) -> out_q, out_scale:
// residual = s = x + residual, in place; per_token_quant of s / sqrt(mean(s^2) + eps) * weight,
// from s before it is rounded
#include "norm/norm_quant.cuh"

namespace opmux::gpu {

LaunchNormQuant launch_fused_add_rmsnorm_per_token_quant;

#if OPMUX_KERNEL
void launch_fused_add_rmsnorm_per_token_quant(const NormQuantRows& rows, Stream stream) {
  launch_norm_quant<true, false>("fused_add_rmsnorm_per_token_quant", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void fused_add_rmsnorm_per_token_quant(const Tensor& x, Tensor residual, const Tensor& weight,
                                       double eps, bool int8, Tensor out_q, Tensor out_scale) {
  const char* const op = "fused_add_rmsnorm_per_token_quant";
  check_same_device(op, x, residual, weight, out_q, out_scale);
  check_norm_quant(op, x, weight);
  const QuantizedRows out = token_rows(op, out_q, out_scale, x.size(0), x.size(1), int8);
  norm_quant(op, launch_fused_add_rmsnorm_per_token_quant, x, &residual, weight, eps, out);
}
OPMUX_OP(fused_add_rmsnorm_per_token_quant, fused_add_rmsnorm_per_token_quant);
#endif

}  // namespace opmux::gpu
