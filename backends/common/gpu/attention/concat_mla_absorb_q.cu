// SPDX-License-Identifier: Apache-2.0
// concat_mla_absorb_q(a, b) -> out: concat(a, b) on the last dimension
#include "attention/concat.h"

namespace opmux::gpu {

LaunchConcat launch_concat_mla_absorb_q;

#if OPMUX_KERNEL
void launch_concat_mla_absorb_q(const Concat& heads, Stream stream) {
  launch_concat("concat_mla_absorb_q", heads, stream);
}
#endif

#if OPMUX_LAUNCHER
void concat_mla_absorb_q(const Tensor& a, const Tensor& b, Tensor out) {
  concat("concat_mla_absorb_q", launch_concat_mla_absorb_q, a, b, out, false);
}
OPMUX_OP(concat_mla_absorb_q, concat_mla_absorb_q);
#endif

}  // namespace opmux::gpu
