// SPDX-License-Identifier: Apache-2.0
// concat_mla_k(k, k_nope, k_rope), in place: k[t, h] = concat(k_nope[t, h], k_rope[t, 0])
#include "attention/concat.h"

namespace opmux::gpu {

LaunchConcat launch_concat_mla_k;

#if OPMUX_KERNEL
void launch_concat_mla_k(const Concat& heads, Stream stream) {
  launch_concat("concat_mla_k", heads, stream);
}
#endif

#if OPMUX_LAUNCHER
void concat_mla_k(Tensor k, const Tensor& k_nope, const Tensor& k_rope) {
  concat("concat_mla_k", launch_concat_mla_k, k_nope, k_rope, k, true);
}
OPMUX_OP(concat_mla_k, concat_mla_k);
#endif

}  // namespace opmux::gpu
