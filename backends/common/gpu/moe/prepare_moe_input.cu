// SPDX-License-Identifier: Apache-2.0
// prepare_moe_input(topk_ids, num_experts, n, k) -> expert_offsets, blockscale_offsets,
// problem_sizes1, problem_sizes2, input_permutation, output_permutation
#include "moe/place_slots.cuh"

namespace opmux::gpu {

struct Prepared {
  int32_t* expert_offsets;      // (experts + 1,)
  int32_t* blockscale_offsets;  // (experts + 1,)
  int32_t* sizes1;              // (experts, 3)
  int32_t* sizes2;              // (experts, 3)
  int32_t* input_permutation;   // (tokens * topk,)
  int32_t* output_permutation;  // (tokens, topk)
  int64_t sizes1_stride;
  int64_t sizes2_stride;
  int64_t output_stride;
  int32_t n;
  int32_t k;
};

void launch_prepare_moe_input(const Slots& slots, const Prepared& out, Stream stream);

#if OPMUX_KERNEL
struct PrepareSink {
  static constexpr uint32_t kScaleBlock = 128;  // rows that blockscale_offsets round up to

  Prepared out;
  Divider topk;
  uint32_t slots;
  uint32_t experts;

  __device__ uint64_t widths(uint32_t count) const {
    const uint32_t rounded = (count + kScaleBlock - 1) / kScaleBlock * kScaleBlock;
    return count | static_cast<uint64_t>(rounded) << 32;
  }
  __device__ void expert(uint32_t e, uint32_t count, uint32_t rows, uint32_t scale_rows) const {
    out.expert_offsets[e] = static_cast<int32_t>(rows);
    out.blockscale_offsets[e] = static_cast<int32_t>(scale_rows);
    int32_t* first = out.sizes1 + e * out.sizes1_stride;
    int32_t* second = out.sizes2 + e * out.sizes2_stride;
    first[0] = second[0] = static_cast<int32_t>(count);
    first[1] = 2 * out.n;
    first[2] = second[1] = out.k;
    second[2] = out.n;
  }
  __device__ void turn(const Turn&) const {}
  __device__ void slot(uint32_t place, uint32_t slot) const {
    const Split at = topk.split(slot);
    out.input_permutation[place] = static_cast<int32_t>(at.quotient);
    out.output_permutation[at.quotient * out.output_stride + at.remainder] =
        static_cast<int32_t>(place);
  }
  __device__ void left_out(uint32_t slot) const {
    const Split at = topk.split(slot);
    out.output_permutation[at.quotient * out.output_stride + at.remainder] = -1;
  }
  __device__ void end(uint32_t thread, uint32_t threads, uint32_t rows, uint32_t scale_rows) const {
    for (uint32_t i = rows + thread; i < slots; i += threads) out.input_permutation[i] = -1;
    if (thread == 0) {
      out.expert_offsets[experts] = static_cast<int32_t>(rows);
      out.blockscale_offsets[experts] = static_cast<int32_t>(scale_rows);
    }
  }
};

void launch_prepare_moe_input(const Slots& slots, const Prepared& out, Stream stream) {
  const PrepareSink sink = {out, Divider(slots.topk > 0 ? slots.topk : 1), slots.count,
                            slots.experts};
  launch_place_slots("prepare_moe_input", slots, sink, 2 * int64_t{slots.count}, stream);
}
#endif

#if OPMUX_LAUNCHER
void prepare_moe_input(const Tensor& topk_ids, int64_t num_experts, int64_t n, int64_t k,
                       Tensor expert_offsets, Tensor blockscale_offsets, Tensor problem_sizes1,
                       Tensor problem_sizes2, Tensor input_permutation, Tensor output_permutation) {
  constexpr const char* kOp = "prepare_moe_input";
  check_same_device(kOp, topk_ids, expert_offsets, blockscale_offsets, problem_sizes1,
                    problem_sizes2, input_permutation, output_permutation);
  const Slots slots = slots_of(kOp, topk_ids, num_experts);
  for (const Tensor* sizes : {&problem_sizes1, &problem_sizes2}) {
    check(sizes->dim() == 2 && sizes->size(0) == num_experts && sizes->size(1) == 3, kOp,
          "problem sizes must be (num_experts, 3)");
    check(dtype_of(*sizes) == aoti_torch_dtype_int32(), kOp, "outputs must be int32");
    check_last_dim_contiguous(kOp, *sizes);
  }
  check_same_shape(kOp, topk_ids, output_permutation);
  check(dtype_of(output_permutation) == aoti_torch_dtype_int32(), kOp, "outputs must be int32");
  check_last_dim_contiguous(kOp, output_permutation);
  const Prepared out = {ints_of(kOp, expert_offsets, num_experts + 1),
                        ints_of(kOp, blockscale_offsets, num_experts + 1),
                        static_cast<int32_t*>(problem_sizes1.mutable_data_ptr()),
                        static_cast<int32_t*>(problem_sizes2.mutable_data_ptr()),
                        ints_of(kOp, input_permutation, slots.count),
                        static_cast<int32_t*>(output_permutation.mutable_data_ptr()),
                        problem_sizes1.stride(0),
                        problem_sizes2.stride(0),
                        output_permutation.stride(0),
                        static_cast<int32_t>(n),
                        static_cast<int32_t>(k)};
  const Place place(kOp, topk_ids);
  launch_prepare_moe_input(slots, out, place.stream());
}
OPMUX_OP(prepare_moe_input, prepare_moe_input);
#endif

}  // namespace opmux::gpu
