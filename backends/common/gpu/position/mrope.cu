// SPDX-License-Identifier: Apache-2.0
// mrope(positions, query, key, head_dim, cos_sin_cache, section_t, section_h, section_w,
// mrope_interleaved, is_neox), in place: as rotary_embedding, by a time, height or width position
// for each pair.
#include "position/rotate_heads.h"

namespace opmux::gpu {

struct MropeSections {
  int time, height, width;  // pairs that take each position
  bool interleaved;
};
void launch_mrope(const Rotary& a, const RotaryHeads& query, const RotaryHeads& key,
                  const MropeSections& sections, Stream stream);

#if OPMUX_KERNEL
void launch_mrope(const Rotary& a, const RotaryHeads& query, const RotaryHeads& key,
                  const MropeSections& sections, Stream stream) {
  const ThreePositions::Rule rule = {sections.time, sections.height, sections.width,
                                     sections.interleaved};
  launch_rotate_heads<ThreePositions>("mrope", a, query, key, rule, stream);
}
#endif

#if OPMUX_LAUNCHER
void mrope(const Tensor& positions, Tensor query, std::optional<Tensor> key, int64_t head_dim,
           const Tensor& cos_sin_cache, int64_t section_t, int64_t section_h, int64_t section_w,
           bool mrope_interleaved, bool is_neox) {
  constexpr const char* kOp = "mrope";
  check_same_device(kOp, query, positions);
  check(positions.dim() == 2 && positions.size(0) == 3, kOp, "positions must have shape (3, T)");
  check_last_dim_contiguous(kOp, positions);
  RotatedHeads r =
      rotated_heads(kOp, positions.size(1), query, key, head_dim, cos_sin_cache, is_neox);
  r.rotary.positions = {positions.const_data_ptr(),
                        index_type(kOp, positions) == IndexType::kInt64};
  r.rotary.position_stride = positions.stride(0);
  check(section_t >= 0 && section_h >= 0 && section_w >= 0 &&
            section_t + section_h + section_w == r.rotary.half,
        kOp, "the sections must have rot_dim / 2 pairs together");
  if (is_empty(r)) return;
  const Place place(kOp, query);
  launch_mrope(r.rotary, r.query, r.key,
               {static_cast<int>(section_t), static_cast<int>(section_h),
                static_cast<int>(section_w), mrope_interleaved},
               place.stream());
}
OPMUX_OP(mrope, mrope);
#endif

}  // namespace opmux::gpu
