// SPDX-License-Identifier: Apache-2.0
// moe_align_block_size(topk_ids, num_experts, block_size)
// -> sorted_token_ids, expert_ids, num_tokens_post_pad
#include "moe/place_slots.cuh"

namespace opmux::gpu {

struct Aligned {
  int32_t* sorted;      // (blocks * block_size,)
  int32_t* expert_ids;  // (blocks,)
  int32_t* used;        // (1,), how many of `sorted`
  uint32_t blocks;
  uint32_t block_size;
};

void launch_moe_align(const Slots& slots, const Aligned& out, Stream stream);

#if OPMUX_KERNEL
struct AlignSink {
  static constexpr uint32_t kTeam = 32;  // threads that share an expert's padding

  Aligned out;
  Divider block_size;
  int32_t padding;

  __device__ uint64_t widths(uint32_t count) const {
    return block_size.split(count + out.block_size - 1).quotient * out.block_size;
  }
  __device__ void expert(uint32_t, uint32_t, uint32_t, uint32_t) const {}
  __device__ void left_out(uint32_t) const {}
  __device__ void slot(uint32_t place, uint32_t slot) const {
    out.sorted[place] = static_cast<int32_t>(slot);
  }
  __device__ void turn(const Turn& turn) const {
    const int teams = static_cast<int>(turn.threads / kTeam);
    for (int e = static_cast<int>(turn.thread / kTeam); e < turn.experts; e += teams) {
      const uint32_t end = e + 1 < turn.experts ? turn.offset[e + 1] : turn.end;
      for (uint32_t i = turn.filled[e] + turn.thread % kTeam; i < end; i += kTeam) {
        out.sorted[i] = padding;
      }
    }
    const uint32_t last = block_size.split(turn.end).quotient;
    for (uint32_t block = block_size.split(turn.begin).quotient + turn.thread; block < last;
         block += turn.threads) {
      // the last expert that begins at or before the block; those before it at its place are empty
      int low = 0, high = turn.experts;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        const bool behind = turn.offset[middle] > block * out.block_size;
        low = behind ? low : middle;
        high = behind ? middle : high;
      }
      out.expert_ids[block] = static_cast<int32_t>(turn.first) + low;
    }
  }
  __device__ void end(uint32_t thread, uint32_t threads, uint32_t used, uint32_t) const {
    const uint32_t size = out.blocks * out.block_size;
    for (uint32_t i = used + thread; i < size; i += threads) out.sorted[i] = padding;
    for (uint32_t block = block_size.split(used).quotient + thread; block < out.blocks;
         block += threads) {
      out.expert_ids[block] = -1;
    }
    if (thread == 0) *out.used = static_cast<int32_t>(used);
  }
};

void launch_moe_align(const Slots& slots, const Aligned& out, Stream stream) {
  const AlignSink sink = {out, Divider(out.block_size), static_cast<int32_t>(slots.count)};
  const int64_t written = static_cast<int64_t>(out.blocks) * out.block_size;
  launch_place_slots("moe_align_block_size", slots, sink, written, stream);
}
#endif

#if OPMUX_LAUNCHER
void moe_align_block_size(const Tensor& topk_ids, int64_t num_experts, int64_t block_size,
                          Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_pad) {
  constexpr const char* kOp = "moe_align_block_size";
  check_same_device(kOp, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_pad);
  const Slots slots = slots_of(kOp, topk_ids, num_experts);
  check(block_size >= 1 && block_size < kMaxRow, kOp, "block_size is out of range");
  const int64_t count = slots.count, owners = count < num_experts ? count : num_experts;
  check(owners == 0 || block_size <= (kMaxRow - count) / owners, kOp,
        "there must be fewer than 2**31 padded slots");
  const int64_t blocks = (count + owners * (block_size - 1)) / block_size;
  const Aligned out = {ints_of(kOp, sorted_token_ids, blocks * block_size),
                       ints_of(kOp, expert_ids, blocks), ints_of(kOp, num_tokens_post_pad, 1),
                       static_cast<uint32_t>(blocks), static_cast<uint32_t>(block_size)};
  const Place place(kOp, topk_ids);
  launch_moe_align(slots, out, place.stream());
}
OPMUX_OP(moe_align_block_size, moe_align_block_size);
#endif

}  // namespace opmux::gpu
