// SPDX-License-Identifier: Apache-2.0
// top_p_renorm_prob(probs, top_p) -> out: the likeliest of each row up to mass p, over their sum
#include "sampling/filter.h"

#if OPMUX_LAUNCHER

namespace opmux::gpu {

void top_p_renorm_prob(const Tensor& probs, const std::optional<Tensor>& top_p_per_row,
                       double top_p, Tensor out) {
  FilterLaunch a = {};
  a.op = "top_p_renorm_prob";
  a.probs = probs_of(a.op, probs);
  a.filter.has_p = true;
  a.filter.p = floats_of(a.op, probs, top_p_per_row, top_p);
  renormalise_to(&a, probs, out);
  if (a.probs.rows * a.probs.size == 0) return;
  const Place place(a.op, probs);
  launch_filter(a, place.stream());
}
OPMUX_OP(top_p_renorm_prob, top_p_renorm_prob);

}  // namespace opmux::gpu

#endif
