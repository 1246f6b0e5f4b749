// SPDX-License-Identifier: Apache-2.0
// rotary_embedding(positions, query, key, head_dim, cos_sin_cache, is_neox), in place: rotates the
// first rot_dim elements of every head by the angles of its token's position.
#include "position/rotate_heads.h"

namespace opmux::gpu {

void launch_rotary_embedding(const Rotary& a, const RotaryHeads& query, const RotaryHeads& key,
                             Stream stream);

#if OPMUX_KERNEL
void launch_rotary_embedding(const Rotary& a, const RotaryHeads& query, const RotaryHeads& key,
                             Stream stream) {
  launch_rotate_heads<OnePosition>("rotary_embedding", a, query, key, {}, stream);
}
#endif

#if OPMUX_LAUNCHER
void rotary_embedding(const Tensor& positions, Tensor query, std::optional<Tensor> key,
                      int64_t head_dim, const Tensor& cos_sin_cache, bool is_neox) {
  constexpr const char* kOp = "rotary_embedding";
  check_same_device(kOp, query, positions);
  RotatedHeads r =
      rotated_heads(kOp, positions.numel(), query, key, head_dim, cos_sin_cache, is_neox);
  r.rotary.positions = indices_of(kOp, positions, r.rotary.tokens);
  if (is_empty(r)) return;
  const Place place(kOp, query);
  launch_rotary_embedding(r.rotary, r.query, r.key, place.stream());
}
OPMUX_OP(rotary_embedding, rotary_embedding);
#endif

}  // namespace opmux::gpu
