// SPDX-License-Identifier: Apache-2.0
// Gives each slot its place in the order of experts, stably and without workspace, in one launch.
// The slots are cut into a slice for each block of a group, and each slice into a part for each
// group:
//   1. every group counts the slots of all experts, a slice a block, and reads one another's counts
//   2. every block places the slots of its part
// Atomics only add up, so that equal inputs give equal results. More experts than kSlotExperts are
// done in turns. So few slots that each thread of a block has one take a kernel of their own.
//
// A sink receives the results; all numbers count slots unless said:
//   widths(count)                     what an expert takes of two running sums: low | high << 32
//   expert(e, count, low, high)       the sums before the expert; one thread of all calls it
//   turn(turn)                        all threads call it for each turn
//   slot(place, slot)                 place = the low sum before the slot's expert + its rank
//   left_out(slot)                    the slot's expert is out of range
//   end(thread, threads, low, high)   both sums; all threads call it
#pragma once

#include "moe/slots.h"

#if OPMUX_KERNEL

#include "reduce.cuh"
#include "rows.cuh"

namespace opmux::gpu {

constexpr int kSlotThreads = 512;  // and slots in a tile
constexpr int kSlotExperts = 512;
constexpr int64_t kFewBlocks = 16;  // for few slots: 8 to 16 are best on an H200
constexpr int kSlotBatch = 8;       // ids that a thread has on their way
constexpr uint32_t kNoExpert = 0xffffffffu;

// Slots of a tile are in units of as many as a word has bits.
constexpr int kUnit = 32;
constexpr int kUnits = kSlotThreads / kUnit;

using SlotTable = Shared<uint32_t, kSlotExperts>;
using SlotScratch = Shared<uint64_t, kMaxWarps>;

// What is known of the experts of one turn.
struct Turn {
  uint32_t first;
  int experts;
  uint32_t begin, end;       // the low sum before the first expert and behind the last
  SlotTable& offset;         // the low sum before an expert
  SlotTable& filled;         // and with its slots
  uint32_t thread, threads;  // of all
};

struct BlockSum {
  uint64_t before;  // of the threads before this one
  uint64_t total;
};

// Sums over the block. All its threads call it; `scratch` may be used again after the next
// barrier.
__device__ inline BlockSum scan_threads(uint64_t value, SlotScratch& scratch) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const uint64_t through = scan_lanes(value);
  if (static_cast<int>(threadIdx.x) % kWarp == kWarp - 1) scratch[warp] = through;
  __syncthreads();
  BlockSum sum = {through - value, 0};
#pragma unroll
  for (int w = 0; w < kSlotThreads / kWarp; ++w) {
    const uint64_t part = scratch[w];
    sum.total += part;
    if (w < warp) sum.before += part;
  }
  return sum;
}

template <class Id, class Sink>
__global__ void __launch_bounds__(kSlotThreads)
    place_slots_kernel(Slots a, Divider topk, uint32_t parts, Sink sink) {
  __shared__ SlotTable count;   // of the slots of this block's slice
  __shared__ SlotTable before;  // of those before its part
  __shared__ SlotTable place;   // of the next slot of an expert
  __shared__ SlotTable offset;
  __shared__ SlotTable filled;
  __shared__ Shared<uint32_t, kUnits * kSlotExperts> members;  // the slots of a unit, a bit each
  __shared__ SlotScratch scratch;
  wait_for_previous();
  let_next_start();
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t rank = group_rank(), blocks = group_size();
  const uint32_t part = blockIdx.x / blocks;
  const uint32_t thread_of_all = blockIdx.x * kSlotThreads + thread;
  const uint32_t threads_of_all = gridDim.x * kSlotThreads;

  const auto at_most = [](uint32_t v, uint32_t limit) { return v < limit ? v : limit; };
  const uint32_t slice = (a.count + blocks - 1) / blocks;
  const uint32_t slice_begin = at_most(rank * slice, a.count);
  const uint32_t slice_end = at_most(slice_begin + slice, a.count);
  const uint32_t share = (slice + parts - 1) / parts;
  const uint32_t begin = at_most(slice_begin + part * share, slice_end);
  const uint32_t end = at_most(begin + share, slice_end);

  // Slots behind the end have no expert.
  const auto expert_of = [&](uint32_t slot, uint32_t limit) {
    // Read without a branch, so that loads are in flight together.
    const Split at = topk.split(slot < limit ? slot : slice_begin);
    const int64_t id = static_cast<const Id*>(a.ids.data)[at.quotient * a.stride + at.remainder];
    return slot < limit && id >= 0 && id < a.experts ? static_cast<uint32_t>(id) : kNoExpert;
  };
  uint32_t mine = begin < end ? expert_of(begin + thread, end) : kNoExpert;
  if (begin + thread < end && mine == kNoExpert) sink.left_out(begin + thread);
  uint64_t sums = 0;

  for (uint32_t first = 0; first < a.experts; first += kSlotExperts) {
    const int experts = static_cast<int>(at_most(a.experts - first, kSlotExperts));
    const auto in_turn = [&](uint32_t expert) {
      return expert >= first && expert - first < static_cast<uint32_t>(experts);
    };
    for (int e = thread; e < experts; e += kSlotThreads) count[e] = before[e] = 0;
    for (int i = thread; i < kUnits * experts; i += kSlotThreads) members[i] = 0;
    __syncthreads();

    for (uint32_t from = slice_begin; from < slice_end; from += kSlotBatch * kSlotThreads) {
      uint32_t expert[kSlotBatch];
#pragma unroll
      for (int b = 0; b < kSlotBatch; ++b) {
        expert[b] = expert_of(from + b * kSlotThreads + thread, slice_end);
      }
#pragma unroll
      for (int b = 0; b < kSlotBatch; ++b) {
        const bool early = from + b * kSlotThreads + thread < begin;
        if (in_turn(expert[b])) {
          atomic_add(early ? before : count, static_cast<int>(expert[b] - first), 1);
        }
      }
    }
    __syncthreads();
    for (int e = thread; e < experts; e += kSlotThreads) count[e] = count[e] + before[e];
    group_sync();

    const uint32_t turn_begin = static_cast<uint32_t>(sums);
    uint32_t total = 0, earlier = 0;
    if (thread < experts) {
#pragma unroll 8
      for (uint32_t block = 0; block < blocks; ++block) {
        const uint32_t slots = group_read(count, static_cast<int>(block), thread);
        total += slots;
        earlier += block < rank ? slots : 0;
      }
    }
    const BlockSum sum = scan_threads(thread < experts ? sink.widths(total) : 0, scratch);
    if (thread < experts) {
      const uint64_t start = sums + sum.before;
      const uint32_t low = static_cast<uint32_t>(start);
      place[thread] = low + earlier + before[thread];
      offset[thread] = low;
      filled[thread] = low + total;
      if (blockIdx.x == 0) {
        sink.expert(first + thread, total, low, static_cast<uint32_t>(start >> 32));
      }
    }
    sums += sum.total;
    __syncthreads();

    for (uint32_t from = begin; from < end; from += kSlotThreads) {
      const uint32_t slot = from + thread;
      if (from != begin || first != 0) mine = expert_of(slot, end);
      if (first == 0 && from != begin && slot < end && mine == kNoExpert) sink.left_out(slot);
      const bool here = in_turn(mine);
      const int e = here ? static_cast<int>(mine - first) : 0;
      if (here) atomic_add(members, thread / kUnit * experts + e, 1u << thread % kUnit);
      __syncthreads();
      if (here) {
        uint32_t to = place[e];
        for (int unit = 0; unit < thread / kUnit; ++unit) {
          to += count_bits(members[unit * experts + e]);
        }
        const uint32_t earlier_lanes = (1u << thread % kUnit) - 1;
        to += count_bits(members[thread / kUnit * experts + e] & earlier_lanes);
        sink.slot(to, slot);
      }
      if (from + kSlotThreads >= end) break;
      __syncthreads();
      for (int i = thread; i < experts; i += kSlotThreads) {
        uint32_t placed = 0;
        for (int unit = 0; unit < kUnits; ++unit) {
          placed += count_bits(members[unit * experts + i]);
          members[unit * experts + i] = 0;
        }
        place[i] = place[i] + placed;
      }
      __syncthreads();
    }
    sink.turn(Turn{first, experts, turn_begin, static_cast<uint32_t>(sums), offset, filled,
                   thread_of_all, threads_of_all});
    group_sync();  // the other blocks have read `count`
  }
  sink.end(thread_of_all, threads_of_all, static_cast<uint32_t>(sums),
           static_cast<uint32_t>(sums >> 32));
}

// Every block counts all slots; each does its share of the padding, the first one of the rest.
template <class Id, class Sink>
__global__ void __launch_bounds__(kSlotThreads)
    place_few_slots_kernel(Slots a, Divider topk, Sink sink) {
  __shared__ SlotTable offset;
  __shared__ SlotTable filled;
  __shared__ Shared<uint32_t, kUnits * kSlotExperts> members;
  __shared__ SlotScratch scratch;
  wait_for_previous();
  let_next_start();
  const int thread = static_cast<int>(threadIdx.x), unit = thread / kUnit;
  const int slots = static_cast<int>(a.count), experts = static_cast<int>(a.experts);
  const int units = (slots + kUnit - 1) / kUnit;
  const Split at = topk.split(thread < slots ? thread : 0);
  const int64_t id = static_cast<const Id*>(a.ids.data)[at.quotient * a.stride + at.remainder];
  for (int i = thread; i < units * experts; i += kSlotThreads) members[i] = 0;
  __syncthreads();

  const bool here = thread < slots && id >= 0 && id < experts;
  const int e = here ? static_cast<int>(id) : 0;
  if (here) atomic_add(members, unit * experts + e, 1u << thread % kUnit);
  __syncthreads();
  uint32_t rank = 0, total = 0;
  if (here) {
    for (int u = 0; u < unit; ++u) rank += count_bits(members[u * experts + e]);
    const uint32_t earlier_lanes = (1u << thread % kUnit) - 1;
    rank += count_bits(members[unit * experts + e] & earlier_lanes);
  }
  if (thread < experts) {
    for (int u = 0; u < units; ++u) total += count_bits(members[u * experts + thread]);
  }
  const BlockSum sum = scan_threads(thread < experts ? sink.widths(total) : 0, scratch);
  const uint32_t low = static_cast<uint32_t>(sum.before);
  if (thread < experts) {
    offset[thread] = low;
    filled[thread] = low + total;
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    if (thread < experts) {
      sink.expert(thread, total, low, static_cast<uint32_t>(sum.before >> 32));
    }
    if (here) {
      sink.slot(offset[e] + rank, thread);
    } else if (thread < slots) {
      sink.left_out(thread);
    }
  }
  const uint32_t thread_of_all = blockIdx.x * kSlotThreads + thread;
  const uint32_t threads_of_all = gridDim.x * kSlotThreads, all = static_cast<uint32_t>(sum.total);
  sink.turn(Turn{0, experts, 0, all, offset, filled, thread_of_all, threads_of_all});
  sink.end(thread_of_all, threads_of_all, all, static_cast<uint32_t>(sum.total >> 32));
}

// `written` counts the numbers that the sink writes.
template <class Sink>
void launch_place_slots(const char* op, const Slots& a, const Sink& sink, int64_t written,
                        Stream stream) {
  const Divider topk(a.topk > 0 ? a.topk : 1);
  // None would leave a thread without an id to look at.
  if (a.count > 0 && a.count <= kSlotThreads && a.experts <= kSlotExperts) {
    const int64_t wanted = ceil_div(written, kSlotThreads);
    const int64_t blocks = wanted < kFewBlocks ? wanted : kFewBlocks;
    const Launch at = {op, stream, blocks, kSlotThreads};
    if (a.ids.wide) return launch(at, place_few_slots_kernel<int64_t, Sink>, a, topk, sink);
    return launch(at, place_few_slots_kernel<int32_t, Sink>, a, topk, sink);
  }
  // A group costs a microsecond or two: few slots are counted faster by every block for itself.
  constexpr int64_t kSlotsAlone = 4096;
  const int64_t group = a.count > kSlotsAlone ? vendor::max_group() : 1;
  const int64_t most = vendor::device().processors / group;
  const int64_t wanted =
      ceil_div(a.count > written / 8 ? a.count : written / 8, group * kSlotThreads);
  const int64_t parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
  const auto run = [&](auto kernel) {
    launch({op, stream, parts * group, kSlotThreads, static_cast<int>(group)}, kernel, a, topk,
           static_cast<uint32_t>(parts), sink);
  };
  if (a.ids.wide) {
    run(place_slots_kernel<int64_t, Sink>);
  } else {
    run(place_slots_kernel<int32_t, Sink>);
  }
}

}  // namespace opmux::gpu

#endif
