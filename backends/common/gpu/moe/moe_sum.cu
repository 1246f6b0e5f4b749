// SPDX-License-Identifier: Apache-2.0
// moe_sum(x) -> out: out[t] = sum over j of x[t, j]
#include "moe/row_sum.h"

namespace opmux::gpu {

void launch_moe_sum(const RowSum& rows, Stream stream);

#if OPMUX_KERNEL
void launch_moe_sum(const RowSum& rows, Stream stream) {
  launch_row_sum<false>("moe_sum", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void moe_sum(const Tensor& x, Tensor out) {
  const RowSum rows = row_sum_of("moe_sum", x, 1.0, out);
  if (rows.tokens * rows.width == 0) return;
  const Place place("moe_sum", x);
  launch_moe_sum(rows, place.stream());
}
OPMUX_OP(moe_sum, moe_sum);
#endif

}  // namespace opmux::gpu
