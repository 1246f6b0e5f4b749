// SPDX-License-Identifier: Apache-2.0
// top_k_renorm_prob(probs, top_k) -> out: the k largest of each row, ties included, over their sum
#include "sampling/filter.h"

#if OPMUX_LAUNCHER

namespace opmux::gpu {

void top_k_renorm_prob(const Tensor& probs, const std::optional<Tensor>& top_k_per_row,
                       int64_t top_k, Tensor out) {
  FilterLaunch a = {};
  a.op = "top_k_renorm_prob";
  a.probs = probs_of(a.op, probs);
  a.filter.has_k = true;
  a.filter.k = ints_of(a.op, probs, top_k_per_row, top_k);
  renormalise_to(&a, probs, out);
  if (a.probs.rows * a.probs.size == 0) return;
  const Place place(a.op, probs);
  launch_filter(a, place.stream());
}
OPMUX_OP(top_k_renorm_prob, top_k_renorm_prob);

}  // namespace opmux::gpu

#endif
