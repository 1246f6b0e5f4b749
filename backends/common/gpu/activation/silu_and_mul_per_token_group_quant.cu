// SPDX-License-Identifier: Apache-2.0
// silu_and_mul_per_token_group_quant(x, group_size, int8, scale_layout) -> out_q, out_scale:
// per_token_group_quant of silu(x[:, :d]) * x[:, d:]
#include "quantization/group_quant.cuh"

namespace opmux::gpu {

LaunchGroupQuant launch_silu_and_mul_per_token_group_quant;

#if OPMUX_KERNEL
void launch_silu_and_mul_per_token_group_quant(const GroupQuantRows& rows, Stream stream) {
  launch_group_quant<SiluAndMulValue>("silu_and_mul_per_token_group_quant", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void silu_and_mul_per_token_group_quant(const Tensor& x, int64_t group_size, bool int8,
                                        int64_t scale_layout, Tensor out_q, Tensor out_scale) {
  group_quant("silu_and_mul_per_token_group_quant", launch_silu_and_mul_per_token_group_quant, 2, x,
              group_size, int8, scale_layout, out_q, out_scale);
}
OPMUX_OP(silu_and_mul_per_token_group_quant, silu_and_mul_per_token_group_quant);
#endif

}  // namespace opmux::gpu
