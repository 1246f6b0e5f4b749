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
  int64_t experts;
  int at_a_time;  // experts whose slots are counted together
  int64_t first_token;
};

constexpr int kBlocksOfProcessor = 5;

// The slots of the experts are one sequence, of which every block takes an equal share: the host
// knows only the most tokens that an expert may have.
template <class T, class Q, class Grouping>
__global__ void __launch_bounds__(kGroupQuantThreads, kBlocksOfProcessor)
    masked_group_quant_kernel(MaskedArgs m) {
  constexpr int kGroups = kGroupQuantThreads / Grouping::kLanes;
  __shared__ Shared<uint32_t, kGroupQuantThreads> ends;  // where each expert's slots end
  __shared__ Shared<uint32_t, kMaxWarps> scratch;
  wait_for_previous();
  let_next_start();
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t slots_of_token = m.group.slots_of_token.divisor, most = m.group.tokens;
  const auto slots_of = [&](int64_t expert) {
    const int64_t count = m.counts[expert] - m.first_token;
    return (count < 0 ? 0 : count < most ? static_cast<uint32_t>(count) : most) * slots_of_token;
  };
  for (int64_t base = 0; base < m.experts; base += m.at_a_time) {
    const bool has = thread < m.at_a_time && base + thread < m.experts;
    ends[thread] = scan_block(has ? slots_of(base + thread) : 0, scratch);
    __syncthreads();
    const uint32_t slots = ends[kGroupQuantThreads - 1];
    int expert = 0;
    // All lanes of a warp go through the same number of slots.
    for (uint32_t first = blockIdx.x * kGroups; first < slots; first += gridDim.x * kGroups) {
      const uint32_t wanted = first + thread / Grouping::kLanes;
      const uint32_t slot = wanted < slots ? wanted : slots - 1;
      while (ends[expert] <= slot) ++expert;
      const uint32_t begin = expert > 0 ? ends[expert - 1] : 0;
      GroupQuantArgs a = m.group;
      a.x = static_cast<const T*>(a.x) + (base + expert) * m.x_expert;
      a.q += (base + expert) * m.q_expert;
      a.scales.data = static_cast<float*>(a.scales.data) + (base + expert) * m.scale_expert;
      quantize_slot<SiluAndMulValue, T, Q, Grouping>(a, slot - begin, wanted < slots);
    }
    __syncthreads();
  }
}

void launch_silu_and_mul_masked_per_token_group_quant(const MaskedRows& in, Stream stream) {
  const char* const op = "silu_and_mul_masked_per_token_group_quant";
  const vendor::Device& device = vendor::device();
  const auto run = [&](auto type_tag, auto quantized_tag) {
    using T = typename decltype(type_tag)::Type;
    using Q = typename decltype(quantized_tag)::Type;
    const GroupQuantRows& rows = in.rows;
    const bool aligned =
        aligned_groups<T>(rows.x, rows.x_stride, rows.out) &&
        aligned_to(rows.x, in.x_expert, sizeof(T), kVectorBytes) &&
        aligned_to(rows.out.q, in.q_expert, 1, store_bytes<T>(rows.out.group_size));
    for_grouping<T>(rows.out.group_size, aligned, [&](auto grouping_tag) {
      using Grouping = typename decltype(grouping_tag)::Type;
      const int64_t most_experts = kMaxSlots / rows.out.scales.padded_groups();
      const int64_t at_a_time =
          most_experts < kGroupQuantThreads ? most_experts : kGroupQuantThreads;
      for_slots<T>(rows, kMaxSlots / at_a_time, [&](int64_t first, const GroupQuantArgs& a) {
        const int64_t needed =
            ceil_div(in.experts * a.slots, kGroupQuantThreads / Grouping::kLanes);
        const int64_t most = static_cast<int64_t>(device.processors) * kBlocksOfProcessor;
        const MaskedArgs m = {a,
                              in.x_expert,
                              in.q_expert,
                              in.scale_expert,
                              in.counts,
                              in.experts,
                              static_cast<int>(at_a_time),
                              first};
        launch({op, stream, needed < most ? needed : most, kGroupQuantThreads},
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
