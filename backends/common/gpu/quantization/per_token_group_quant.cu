// SPDX-License-Identifier: Apache-2.0
// per_token_group_quant(x, group_size, int8, scale_layout) -> out_q, out_scale:
// out_q = round(x / out_scale), out_scale = amax(|group|) / top
#include "quantization/group_quant.cuh"

namespace opmux::gpu {

LaunchGroupQuant launch_per_token_group_quant;

#if OPMUX_KERNEL
void launch_per_token_group_quant(const GroupQuantRows& rows, Stream stream) {
  launch_group_quant<PlainValue>("per_token_group_quant", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void per_token_group_quant(const Tensor& x, int64_t group_size, bool int8, int64_t scale_layout,
                           Tensor out_q, Tensor out_scale) {
  group_quant("per_token_group_quant", launch_per_token_group_quant, 1, x, group_size, int8,
              scale_layout, out_q, out_scale);
}
OPMUX_OP(per_token_group_quant, per_token_group_quant);
#endif

}  // namespace opmux::gpu
