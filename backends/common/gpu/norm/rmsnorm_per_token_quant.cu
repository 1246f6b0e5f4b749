// SPDX-License-Identifier: Apache-2.0
// rmsnorm_per_token_quant(x, weight, eps, int8) -> out_q, out_scale:
// per_token_quant of x / sqrt(mean(x^2) + eps) * weight
#include "norm/norm_quant.cuh"

namespace opmux::gpu {

LaunchNormQuant launch_rmsnorm_per_token_quant;

#if OPMUX_KERNEL
void launch_rmsnorm_per_token_quant(const NormQuantRows& rows, Stream stream) {
  launch_norm_quant<false, false>("rmsnorm_per_token_quant", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void rmsnorm_per_token_quant(const Tensor& x, const Tensor& weight, double eps, bool int8,
                             Tensor out_q, Tensor out_scale) {
  const char* const op = "rmsnorm_per_token_quant";
  check_same_device(op, x, weight, out_q, out_scale);
  check_norm_quant(op, x, weight);
  const QuantizedRows out = token_rows(op, out_q, out_scale, x.size(0), x.size(1), int8);
  norm_quant(op, launch_rmsnorm_per_token_quant, x, nullptr, weight, eps, out);
}
OPMUX_OP(rmsnorm_per_token_quant, rmsnorm_per_token_quant);
#endif

}  // namespace opmux::gpu
