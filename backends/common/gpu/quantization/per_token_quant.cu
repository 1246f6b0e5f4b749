// SPDX-License-Identifier: Apache-2.0
// per_token_quant(x, int8) -> out_q, out_scale:
// out_q = round(x / out_scale), out_scale = amax(|row|) / top
#include "quantization/row_quant.cuh"

namespace opmux::gpu {

LaunchRowQuant launch_per_token_quant;

#if OPMUX_KERNEL
void launch_per_token_quant(const RowQuantRows& rows, Stream stream) {
  launch_row_quant<Before::kNothing, false>("per_token_quant", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void per_token_quant(const Tensor& x, bool int8, Tensor out_q, Tensor out_scale) {
  const char* const op = "per_token_quant";
  check_same_device(op, x, out_q, out_scale);
  const FloatType type = float_type(op, x);
  check(x.dim() == 2, op, "x must have two dimensions");
  const QuantizedRows out = token_rows(op, out_q, out_scale, x.size(0), x.size(1), int8);
  if (x.size(0) == 0) return;
  const Place place(op, x);
  launch_per_token_quant({x.const_data_ptr(), row_stride(x), nullptr, 0, nullptr, 0, out, type},
                         place.stream());
}
OPMUX_OP(per_token_quant, per_token_quant);
#endif

}  // namespace opmux::gpu
