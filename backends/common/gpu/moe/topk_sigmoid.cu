// SPDX-License-Identifier: Apache-2.0
// topk_sigmoid(gating_output, topk, renormalize, correction_bias) -> topk_weights, topk_ids
#include "moe/gate_kernels.cuh"

namespace opmux::gpu {

void launch_topk_sigmoid(const GateRows& rows, Stream stream);

#if OPMUX_KERNEL
struct SigmoidGate {
  static constexpr bool kGrouped = false;
  bool by_score;  // else by the logit, which tells apart what rounds to one score

  bool fits(int, int) const { return true; }

  template <class Each, class Peak, class Sum>
  __device__ void prepare(const Each&, const Peak&, const Sum&) {}
  __device__ uint32_t key(float logit, float bias) const {
    return ordered(by_score ? score(logit) + bias : logit);
  }
  __device__ float score(float logit) const { return sigmoid(logit); }
};

void launch_topk_sigmoid(const GateRows& rows, Stream stream) {
  launch_gate("topk_sigmoid", rows, SigmoidGate{rows.bias != nullptr}, stream);
}
#endif

#if OPMUX_LAUNCHER
void topk_sigmoid(const Tensor& gating_output, int64_t topk, bool renormalize,
                  const std::optional<Tensor>& correction_bias, Tensor topk_weights,
                  Tensor topk_ids) {
  const GateRows rows = gate_rows("topk_sigmoid", gating_output, correction_bias, topk, 0,
                                  renormalize, topk_weights, topk_ids);
  if (rows.tokens == 0) return;
  const Place place("topk_sigmoid", gating_output);
  launch_topk_sigmoid(rows, place.stream());
}
OPMUX_OP(topk_sigmoid, topk_sigmoid);
#endif

}  // namespace opmux::gpu
