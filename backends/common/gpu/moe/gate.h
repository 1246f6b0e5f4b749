// SPDX-License-Identifier: Apache-2.0
// What the gates share: the topk experts of each token, and their weights.
#pragma once

#include "gpu.h"

namespace opmux::gpu {

struct GateRows {
  const void* logits;  // (tokens, experts)
  const float* bias;   // (experts,), or nullptr
  float* weights;      // (tokens, routed + shared)
  int32_t* ids;        // as weights
  int64_t logits_stride;
  int64_t weights_stride;
  int64_t ids_stride;
  int64_t tokens;
  int experts;
  int routed;  // experts to choose
  int shared;  // more that every token has: ids experts, experts + 1, ...
  float shared_divisor;
  float factor;  // of all weights
  bool renormalize;
  FloatType type;
};

#if OPMUX_LAUNCHER

inline GateRows gate_rows(const char* op, const Tensor& logits, const std::optional<Tensor>& bias,
                          int64_t topk, int64_t shared, bool renormalize, const Tensor& weights,
                          const Tensor& ids) {
  check_same_device(op, logits, weights, ids);
  const FloatType type = float_type(op, logits);
  check(logits.dim() == 2, op, "gating_output must have two dimensions");
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_row(op, experts);
  check(shared >= 0 && shared < topk && topk - shared <= experts && topk < kMaxRow, op,
        "topk is out of range");
  for (const Tensor* out : {&weights, &ids}) {
    check(out->dim() == 2 && out->size(0) == tokens && out->size(1) == topk, op,
          "outputs must be (tokens, topk)");
    check_last_dim_contiguous(op, *out);
  }
  check_last_dim_contiguous(op, logits);
  check_float32(op, weights);
  check(dtype_of(ids) == aoti_torch_dtype_int32(), op, "topk_ids must be int32");
  const float* bias_data = nullptr;
  if (bias.has_value()) {
    check_same_device(op, logits, *bias);
    check_float32(op, *bias);
    check(bias->dim() == 1 && bias->size(0) == experts, op,
          "bias must have one element per expert");
    check_last_dim_contiguous(op, *bias);
    bias_data = static_cast<const float*>(bias->const_data_ptr());
  }
  return {logits.const_data_ptr(),
          bias_data,
          static_cast<float*>(weights.mutable_data_ptr()),
          static_cast<int32_t*>(ids.mutable_data_ptr()),
          logits.stride(0),
          weights.stride(0),
          ids.stride(0),
          tokens,
          static_cast<int>(experts),
          static_cast<int>(topk - shared),
          static_cast<int>(shared),
          1.0f,
          1.0f,
          renormalize,
          type};
}

#endif

}  // namespace opmux::gpu
