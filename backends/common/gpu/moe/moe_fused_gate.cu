// SPDX-License-Identifier: Apache-2.0
// moe_fused_gate(gating_output, bias, num_expert_group, topk_group, topk, num_fused_shared_experts,
// routed_scaling_factor, apply_routed_scaling_factor_on_output, renormalize)
// -> topk_weights, topk_ids: the best experts, by sigmoid + bias, of the best groups
#include "moe/gate_kernels.cuh"

namespace opmux::gpu {

void launch_moe_fused_gate(const GateRows& rows, int groups, int topk_group, Stream stream);

constexpr int64_t kMaxExpertGroups = 1024;

#if OPMUX_KERNEL
static_assert(kMaxExpertGroups == kMaxGroups);

template <bool kMany>
struct GroupedGate {
  static constexpr bool kGrouped = kMany;
  int groups;
  int group_size;
  int topk_group;

  // Lanes share a group, and none has experts of two.
  bool fits(int per_lane, int experts) const {
    if (!kMany) return true;
    return kRowLanes * per_lane == experts && kRowLanes % groups == 0;
  }

  template <class Each, class Peak, class Sum>
  __device__ void prepare(const Each&, const Peak&, const Sum&) {}
  __device__ uint32_t key(float logit, float bias) const { return ordered(score(logit) + bias); }
  __device__ float score(float logit) const { return sigmoid(logit); }

  // Keeps the two largest of two descending pairs.
  static __device__ void keep_two(uint32_t& best, uint32_t& second, uint32_t other_best,
                                  uint32_t other_second) {
    const uint32_t lower = best < other_best ? best : other_best;
    best = best < other_best ? other_best : best;
    second = second < other_second ? other_second : second;
    second = second < lower ? lower : second;
  }
  // second is 0 in groups of one
  static __device__ uint32_t group_key(uint32_t best, uint32_t second) {
    return ordered(second == 0 ? unordered(best) : unordered(best) + unordered(second));
  }
  // Whether group a comes before group b.
  static __device__ bool precedes(uint32_t key_a, int a, uint32_t key_b, int b) {
    return key_a > key_b || (key_a == key_b && a < b);
  }

  template <int kPer>
  __device__ void mask(int lane, uint32_t (&key)[kPer]) const {
    const int lanes = kRowLanes / groups;
    uint32_t best = 0, second = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) keep_two(best, second, key[i], 0);
    for (int distance = 1; distance < lanes; distance *= 2) {
      const uint32_t other_best = shuffle_xor(best, distance);
      const uint32_t other_second = shuffle_xor(second, distance);
      keep_two(best, second, other_best, other_second);
    }
    const uint32_t score = group_key(best, second);
    const int first_lane = static_cast<int>(threadIdx.x) % kWarp - lane;
    int rank = 0;
#pragma unroll 8
    for (int other = 0; other < groups; ++other) {
      rank += precedes(shuffle(score, first_lane + other * lanes), other, score, lane / lanes);
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) key[i] = rank < topk_group ? key[i] : kMasked;
  }
};

void launch_moe_fused_gate(const GateRows& rows, int groups, int topk_group, Stream stream) {
  constexpr const char* kOp = "moe_fused_gate";
  const int size = rows.experts / groups;
  if (topk_group == groups) {
    launch_gate(kOp, rows, GroupedGate<false>{groups, size, topk_group}, stream);
  } else {
    launch_gate(kOp, rows, GroupedGate<true>{groups, size, topk_group}, stream);
  }
}
#endif

#if OPMUX_LAUNCHER
void moe_fused_gate(const Tensor& gating_output, const Tensor& bias, int64_t num_expert_group,
                    int64_t topk_group, int64_t topk, int64_t num_fused_shared_experts,
                    double routed_scaling_factor, bool apply_routed_scaling_factor_on_output,
                    bool renormalize, Tensor topk_weights, Tensor topk_ids) {
  constexpr const char* kOp = "moe_fused_gate";
  GateRows rows = gate_rows(kOp, gating_output, bias, topk, num_fused_shared_experts, renormalize,
                            topk_weights, topk_ids);
  check(num_expert_group >= 1 && num_expert_group <= kMaxExpertGroups, kOp,
        "num_expert_group must be within 1 and 1024");
  check(rows.experts % num_expert_group == 0, kOp, "groups must divide the experts");
  check(topk_group >= 1 && topk_group <= num_expert_group, kOp, "topk_group is out of range");
  check(rows.routed <= rows.experts / num_expert_group * topk_group, kOp, "topk is out of range");
  if (rows.tokens == 0) return;
  rows.shared_divisor = static_cast<float>(routed_scaling_factor);
  if (apply_routed_scaling_factor_on_output) rows.factor = rows.shared_divisor;
  const Place place(kOp, gating_output);
  launch_moe_fused_gate(rows, static_cast<int>(num_expert_group), static_cast<int>(topk_group),
                        place.stream());
}
OPMUX_OP(moe_fused_gate, moe_fused_gate);
#endif

}  // namespace opmux::gpu
