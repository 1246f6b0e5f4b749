// SPDX-License-Identifier: Apache-2.0
// rmsnorm_per_token_group_quant(x, weight, eps, group_size, int8, scale_layout)
// -> out_q, out_scale:
// per_token_group_quant of x / sqrt(mean(x^2) + eps) * weight
#include "norm/norm_quant.cuh"

namespace opmux::gpu {

LaunchNormQuant launch_rmsnorm_per_token_group_quant;

#if OPMUX_KERNEL
void launch_rmsnorm_per_token_group_quant(const NormQuantRows& rows, Stream stream) {
  launch_norm_quant<false, true>("rmsnorm_per_token_group_quant", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void rmsnorm_per_token_group_quant(const Tensor& x, const Tensor& weight, double eps,
                                   int64_t group_size, bool int8, int64_t scale_layout,
                                   Tensor out_q, Tensor out_scale) {
  const char* const op = "rmsnorm_per_token_group_quant";
  check_same_device(op, x, weight, out_q, out_scale);
  check_norm_quant(op, x, weight);
  const QuantizedRows out =
      group_rows(op, out_q, out_scale, x.size(0), x.size(1), group_size, int8, scale_layout);
  norm_quant(op, launch_rmsnorm_per_token_group_quant, x, nullptr, weight, eps, out);
}
OPMUX_OP(rmsnorm_per_token_group_quant, rmsnorm_per_token_group_quant);
#endif

}  // namespace opmux::gpu
