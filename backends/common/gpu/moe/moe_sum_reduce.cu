// SPDX-License-Identifier: Apache-2.0
// moe_sum_reduce(x, routed_scaling_factor) -> out: out[t] = factor * sum over j of x[t, j]
#include "moe/row_sum.h"

namespace opmux::gpu {

void launch_moe_sum_reduce(const RowSum& rows, Stream stream);

#if OPMUX_KERNEL
void launch_moe_sum_reduce(const RowSum& rows, Stream stream) {
  launch_row_sum<false>("moe_sum_reduce", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void moe_sum_reduce(const Tensor& x, double routed_scaling_factor, Tensor out) {
  const RowSum rows = row_sum_of("moe_sum_reduce", x, routed_scaling_factor, out);
  if (rows.tokens * rows.width == 0) return;
  const Place place("moe_sum_reduce", x);
  launch_moe_sum_reduce(rows, place.stream());
}
OPMUX_OP(moe_sum_reduce, moe_sum_reduce);
#endif

}  // namespace opmux::gpu
