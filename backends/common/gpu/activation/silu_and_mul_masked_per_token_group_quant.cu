// SPDX-License-Identifier: Apache-2.0
// silu_and_mul_masked_per_token_group_quant(x, out_q, out_scale, expert_num_tokens, group_size,
// scale_layout), in place: per_token_group_quant of silu(x[..., :d]) * x[..., d:], for the first
// expert_num_tokens[e] tokens of every expert e
#include "quantization/group_quant.cuh"

namespace opmux::gpu {

struct MaskedRows {
  GroupQuantRows rows;                       // of the first expert
  int64_t x_expert, q_expert, scale_expert;  // strides
  const int32_t* counts;
  int64_t experts;
};

void launch_silu_and_mul_masked_per_token_group_quant(const MaskedRows& in, Stream stream);

#if OPMUX_KERNEL

struct MaskedArgs {
  GroupQuantArgs group;
  int64_t x_expert, q_expert, scale_expert;
  const int32_t* counts;
  int64_t first_token;
  uint32_t blocks_of_expert;
};

// The blocks of an expert share its tokens, however many there are: the host knows only the most.
template <class T, class Q, class Grouping>
__global__ void __launch_bounds__(kGroupQuantThreads) masked_group_quant_kernel(MaskedArgs m) {
  constexpr uint32_t kGroups = kGroupQuantThreads / Grouping::kLanes;
  wait_for_previous();
  let_next_start();
  const uint32_t expert = blockIdx.x / m.blocks_of_expert;
  const uint32_t block = blockIdx.x - expert * m.blocks_of_expert;
  const int64_t count = static_cast<int64_t>(m.counts[expert]) - m.first_token;
  GroupQuantArgs a = m.group;
  if (count < a.scales.tokens) a.scales.tokens = count < 0 ? 0 : count;
  a.x = static_cast<const T*>(a.x) + expert * m.x_expert;
  a.q += expert * m.q_expert;
  a.scales.data = static_cast<float*>(a.scales.data) + expert * m.scale_expert;
  const uint32_t slots = static_cast<uint32_t>(a.scales.tokens) * a.slots_of_token.divisor;
  for (uint32_t first = block * kGroups; first < slots; first += m.blocks_of_expert * kGroups) {
    quantize_slot<SiluAndMulValue, T, Q, Grouping>(a, first + threadIdx.x / Grouping::kLanes,
                                                   slots);
  }
}

void launch_silu_and_mul_masked_per_token_group_quant(const MaskedRows& in, Stream stream) {
  const char* const op = "silu_and_mul_masked_per_token_group_quant";
  // Blocks without a token cost little, and an expert with most of the tokens needs many.
  constexpr int64_t kWaves = 8;
  const int64_t most = kWaves * resident_threads() / kGroupQuantThreads / in.experts + 1;
  const auto run = [&](auto type_tag, auto quantized_tag) {
    using T = typename decltype(type_tag)::Type;
    using Q = typename decltype(quantized_tag)::Type;
    const GroupQuantRows& rows = in.rows;
    const bool aligned = aligned_groups<T>(rows.x, rows.x_stride, rows.out) &&
                         aligned_to(rows.x, in.x_expert, sizeof(T), kVectorBytes) &&
                         aligned_to(rows.out.q, in.q_expert, 1, kFull<T>);
    for_grouping<T>(rows.out.group_size, aligned, [&](auto grouping_tag) {
      using Grouping = typename decltype(grouping_tag)::Type;
      const int64_t groups = rows.out.scales.padded_groups();
      for_tokens(rows.out, kMaxSlots / groups, [&](int64_t first, const QuantizedRows& out) {
        const T* x = static_cast<const T*>(rows.x) + first * rows.x_stride;
        const int64_t slots = out.scales.tokens * groups;
        const int64_t needed = ceil_div(slots, kGroupQuantThreads / Grouping::kLanes);
        const int64_t blocks = needed < most ? needed : most;
        const GroupQuantArgs a = {x,
                                  rows.x_stride,
                                  static_cast<uint8_t*>(out.q),
                                  out.stride,
                                  out.scales,
                                  out.width,
                                  out.group_size,
                                  Divider(groups),
                                  static_cast<uint32_t>(slots)};
        const MaskedArgs m = {a,
                              in.x_expert,
                              in.q_expert,
                              in.scale_expert,
                              in.counts,
                              first,
                              static_cast<uint32_t>(blocks)};
        launch({op, stream, blocks * in.experts, kGroupQuantThreads},
               masked_group_quant_kernel<T, Q, Grouping>, m);
      });
    });
  };
  for_float_type(in.rows.type, [&](auto type_tag) {
    for_quantized_type(in.rows.out.int8, [&](auto quantized_tag) { run(type_tag, quantized_tag); });
  });
}
#endif

#if OPMUX_LAUNCHER
void silu_and_mul_masked_per_token_group_quant(const Tensor& x, Tensor out_q, Tensor out_scale,
                                               const Tensor& expert_num_tokens, int64_t group_size,
                                               int64_t scale_layout) {
  const char* const op = "silu_and_mul_masked_per_token_group_quant";
  check_same_device(op, x, out_q, out_scale, expert_num_tokens);
  const FloatType type = float_type(op, x);
  check(x.dim() == 3 && x.size(2) % 2 == 0, op, "x must be (experts, tokens, 2 * d)");
  check_row(op, x.size(2));
  const int64_t experts = x.size(0), tokens = x.size(1), width = x.size(2) / 2;
  check(out_q.dim() == 3 && out_q.size(0) == experts && out_q.size(1) == tokens &&
            out_q.size(2) == width,
        op, "out_q must be (experts, tokens, d)");
  const bool int8 = dtype_of(out_q) == aoti_torch_dtype_int8();
  check_quantized(op, out_q, int8);
  check(out_scale.dim() == 3 && out_scale.size(0) == experts, op,
        "out_scale must have a part for each expert");
  ScalesOf scales = group_scales(op, out_scale, tokens, width, group_size, scale_layout);
  scales.padding = 0;
  check(dtype_of(expert_num_tokens) == aoti_torch_dtype_int32() && expert_num_tokens.dim() == 1 &&
            expert_num_tokens.size(0) == experts,
        op, "expert_num_tokens must be int32, one for each expert");
  if (experts * tokens * width == 0) return;
  const Place place(op, x);
  const QuantizedRows out = {
      out_q.mutable_data_ptr(), row_stride(out_q, 1), scales, width, group_size, int8};
  launch_silu_and_mul_masked_per_token_group_quant(
      {{x.const_data_ptr(), row_stride(x, 1), out, type},
       row_stride(x),
       row_stride(out_q),
       row_stride(out_scale),
       static_cast<const int32_t*>(expert_num_tokens.const_data_ptr()),
       experts},
      place.stream());
}
OPMUX_OP(silu_and_mul_masked_per_token_group_quant, silu_and_mul_masked_per_token_group_quant);
#endif

}  // namespace opmux::gpu
