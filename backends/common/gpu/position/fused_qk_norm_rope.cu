// SPDX-License-Identifier: Apache-2.0
// fused_qk_norm_rope(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight,
// cos_sin_cache, is_neox, positions), in place: the query's and the keys' heads, each divided by
// its root mean square, weighted and rotated.
#include "position/qk_norm.h"

namespace opmux::gpu {

LaunchQkNorm launch_fused_qk_norm_rope;

#if OPMUX_KERNEL
void launch_fused_qk_norm_rope(const QkNorm& a, Stream stream) {
  launch_qk_norm<false>("fused_qk_norm_rope", a, stream);
}
#endif

#if OPMUX_LAUNCHER
void fused_qk_norm_rope(Tensor qkv, int64_t num_heads_q, int64_t num_heads_k, int64_t num_heads_v,
                        int64_t head_dim, double eps, const Tensor& q_weight,
                        const Tensor& k_weight, const Tensor& cos_sin_cache, bool is_neox,
                        const Tensor& positions) {
  constexpr const char* kOp = "fused_qk_norm_rope";
  const QkNorm a = qk_norm_of(kOp, qkv, {num_heads_q, num_heads_k, num_heads_v}, head_dim, eps,
                              q_weight, k_weight, cos_sin_cache, is_neox, positions);
  if (a.rotary.tokens == 0) return;
  const Place place(kOp, qkv);
  launch_fused_qk_norm_rope(a, place.stream());
}
OPMUX_OP(fused_qk_norm_rope, fused_qk_norm_rope);
#endif

}  // namespace opmux::gpu
