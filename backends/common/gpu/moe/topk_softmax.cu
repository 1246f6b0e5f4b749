// SPDX-License-Identifier: Apache-2.0
// topk_softmax(gating_output, topk, renormalize, moe_softcapping, correction_bias)
// -> topk_weights, topk_ids
#include "moe/gate_kernels.cuh"

namespace opmux::gpu {

void launch_topk_softmax(const GateRows& rows, float cap, Stream stream);

#if OPMUX_KERNEL
struct SoftmaxGate {
  static constexpr bool kGrouped = false;
  float cap;  // 0: none
  float inverse_cap;
  bool by_score;  // else by the logit, which gives the same order
  float peak;
  float scale;

  bool fits(int, int) const { return true; }

  __device__ float capped(float logit) const {
    return cap > 0 ? cap * tanhf(logit * inverse_cap) : logit;
  }
  template <class Each, class Peak, class Sum>
  __device__ void prepare(const Each& each, const Peak& peak_of, const Sum& sum_of) {
    float value = -kLargest;
    each([&](float logit) { value = fmaxf(value, logit); });
    peak = capped(peak_of(value));
    value = 0;
    each([&](float logit) { value += exp_fast(capped(logit) - peak); });
    scale = 1.0f / sum_of(value);
  }
  __device__ uint32_t key(float logit, float bias) const {
    return ordered(by_score ? score(logit) + bias : logit);
  }
  __device__ float score(float logit) const { return exp_fast(capped(logit) - peak) * scale; }
};

void launch_topk_softmax(const GateRows& rows, float cap, Stream stream) {
  const SoftmaxGate gate = {cap, cap > 0 ? 1.0f / cap : 0.0f, rows.bias != nullptr, 0, 0};
  launch_gate("topk_softmax", rows, gate, stream);
}
#endif

#if OPMUX_LAUNCHER
void topk_softmax(const Tensor& gating_output, int64_t topk, bool renormalize,
                  double moe_softcapping, const std::optional<Tensor>& correction_bias,
                  Tensor topk_weights, Tensor topk_ids) {
  const GateRows rows = gate_rows("topk_softmax", gating_output, correction_bias, topk, 0,
                                  renormalize, topk_weights, topk_ids);
  if (rows.tokens == 0) return;
  const Place place("topk_softmax", gating_output);
  launch_topk_softmax(rows, static_cast<float>(moe_softcapping), place.stream());
}
OPMUX_OP(topk_softmax, topk_softmax);
#endif

}  // namespace opmux::gpu
