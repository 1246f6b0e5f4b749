// SPDX-License-Identifier: Apache-2.0
// top_k_top_p_sample(probs, top_k, top_p, uniform, joint) -> out: a token per row
#include "sampling/filter.cuh"

namespace opmux::gpu {

#if OPMUX_KERNEL
void launch_filter(const FilterLaunch& a, Stream stream) {
  for_rows(a.probs, a.out, a.out_stride, [&](auto tag, auto size) {
    using T = typename decltype(tag)::Type;
    const int group = blocks_per_row(a.probs);
    launch({a.op, stream, a.probs.rows * group, kRowThreads, group},
           filter_kernel<T, decltype(size)::value>, a);
  });
}
#endif

#if OPMUX_LAUNCHER
void top_k_top_p_sample(const Tensor& probs, const std::optional<Tensor>& top_k_per_row,
                        int64_t top_k, const std::optional<Tensor>& top_p_per_row, double top_p,
                        const Tensor& uniform, bool joint, Tensor out) {
  FilterLaunch a = {};
  a.op = "top_k_top_p_sample";
  a.probs = probs_of(a.op, probs);
  a.filter = {true, true, ints_of(a.op, probs, top_k_per_row, top_k),
              floats_of(a.op, probs, top_p_per_row, top_p), joint};
  a.uniform = floats_of(a.op, probs, uniform);
  a.tokens = tokens_of(a.op, probs, out);
  if (a.probs.rows == 0) return;
  const Place place(a.op, probs);
  launch_filter(a, place.stream());
}
OPMUX_OP(top_k_top_p_sample, top_k_top_p_sample);
#endif

}  // namespace opmux::gpu
