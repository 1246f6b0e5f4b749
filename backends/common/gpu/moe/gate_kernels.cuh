// SPDX-License-Identifier: Apache-2.0
// The kernels of the gates. Experts are chosen by integer keys that order as the floats do; of
// equal keys the lower expert is taken.
//   up to 512 experts, 32 chosen   32 lanes share a token and keep its keys in registers
//   more                           a block a token, which reads the row once per choice
//
// A gate has:
//   kGrouped                          whether only the experts of the best groups may be chosen
//   fits(per_lane, experts)           host code: whether lanes can mask the other groups
//   prepare(each, peak, sum)          what has to be known of the row as a whole
//   key(logit, bias), score(logit)    what orders the experts, and the weight of a chosen one
#pragma once

#include "moe/gate.h"

#if OPMUX_KERNEL

#include "math.cuh"
#include "moe/row_lanes.cuh"
#include "vec.cuh"

namespace opmux::gpu {

constexpr int kGateThreads = 128;
constexpr int kMaxGroups = 1024;
constexpr float kLargest = 3.402823466e38f;
constexpr float kTiny = 1e-20f;  // keeps sums of weights that underflowed from dividing by 0
constexpr uint32_t kMasked = 0x007fffffu;  // ordered(-infinity)

// NaN becomes the lowest float.
__device__ inline float finite(float v) { return fminf(fmaxf(v, -kLargest), kLargest); }

// Vectors that a lane reads its neighbouring elements by.
template <class T, int kPer>
constexpr int kGateVector = (kPer & -kPer) < kFull<T> ? (kPer & -kPer) : kFull<T>;

// Elements [lane * kPer, (lane + 1) * kPer) of a row. Vectors lie inside or outside of the row as a
// whole; what is outside is 0.
template <class T, int kPer, bool kVector>
__device__ inline void read_part(const T* row, int lane, int width, float (&value)[kPer]) {
  constexpr int kSize = kVector ? kGateVector<T, kPer> : 1;
#pragma unroll
  for (int i = 0; i < kPer; i += kSize) {
    const int at = lane * kPer + i;
    float part[kSize] = {};
    if (at < width) widen(load<kSize>(row + at), part);
#pragma unroll
    for (int k = 0; k < kSize; ++k) value[i + k] = part[k];
  }
}

// The weight of choice `choice`, of whose `total` all routed ones have a share.
__device__ inline float final_weight(const GateRows& a, int choice, float score, float total) {
  float weight = choice < a.routed ? score : total / a.shared_divisor;
  if (a.renormalize) weight /= total + kTiny;
  return weight * a.factor;
}

template <class Gate, class T, int kPer, bool kVector>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(GateRows a, Gate gate) {
  wait_for_previous();
  let_next_start();
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * (kGateThreads / kRowLanes) +
                        static_cast<int>(threadIdx.x) / kRowLanes;
  const int64_t token = place < a.tokens ? place : a.tokens - 1;
  const T* row = static_cast<const T*>(a.logits) + token * a.logits_stride;
  float logit[kPer], bias[kPer] = {};
  read_part<T, kPer, kVector>(row, lane, a.experts, logit);
  if (a.bias != nullptr) read_part<float, kPer, kVector>(a.bias, lane, a.experts, bias);

#pragma unroll
  for (int i = 0; i < kPer; ++i) logit[i] = finite(logit[i]);
  gate.prepare(
      [&](const auto& f) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if (lane * kPer + i < a.experts) f(logit[i]);
        }
      },
      [](float value) { return unordered(row_max(ordered(value))); },
      [](float value) { return reduce_lanes<kRowLanes>(value, Add{}); });
  uint32_t key[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) key[i] = gate.key(logit[i], bias[i]);
  if constexpr (Gate::kGrouped) gate.mask(lane, key);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (lane * kPer + i >= a.experts) key[i] = 0;
  }

  // Each lane offers its best key, its head, and has the one after it ready: that is found while
  // the reduction over the lanes is under way. `key` holds neither those taken nor the head.
  uint32_t head = 0, head_id = 0;
  const auto take = [&](bool wins) {
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) best = key[i] > best ? key[i] : best;
    int at = kPer;
#pragma unroll
    for (int i = kPer - 1; i >= 0; --i) at = key[i] == best ? i : at;
    if (wins) {
      head = best;
      head_id = static_cast<uint32_t>(lane * kPer + at);
#pragma unroll
      for (int i = 0; i < kPer; ++i) key[i] = i == at ? 0 : key[i];
    }
  };
  take(true);
  uint32_t mine = 0;
  for (int choice = 0; choice < a.routed; ++choice) {
    const uint32_t best = row_max(head);
    const uint32_t id = row_min(head == best ? head_id : 0xffffffffu);
    if (lane == choice) mine = id;
    take(head == best && head_id == id);
  }

  const int topk = a.routed + a.shared;
  float score = 0;
  if (lane < a.routed) score = gate.score(finite(to_float(row[mine])));
  const float total = reduce_lanes<kRowLanes>(score, Add{});
  if (place != token || lane >= topk) return;
  a.weights[token * a.weights_stride + lane] = final_weight(a, lane, score, total);
  a.ids[token * a.ids_stride + lane] =
      lane < a.routed ? static_cast<int32_t>(mine) : a.experts + lane - a.routed;
}

// A block a token, for any number of experts. Each choice is the largest pair of key and expert
// below the one before.
template <class Gate, class T>
__global__ void __launch_bounds__(kGateThreads) gate_loop_kernel(GateRows a, Gate gate) {
  __shared__ Shared<float, kMaxWarps> scratch;
  __shared__ Shared<uint64_t, kMaxWarps> pairs;
  constexpr int kGroups = Gate::kGrouped ? kMaxGroups : 1;
  __shared__ Shared<uint32_t, kGroups> group_score;
  __shared__ Shared<uint32_t, kGroups> group_kept;
  wait_for_previous();
  let_next_start();
  const int64_t token = blockIdx.x;
  const T* row = static_cast<const T*>(a.logits) + token * a.logits_stride;
  float* weights = a.weights + token * a.weights_stride;
  int32_t* ids = a.ids + token * a.ids_stride;
  const int first = static_cast<int>(threadIdx.x);
  const auto key_of = [&](int expert) {
    const float bias = a.bias == nullptr ? 0.0f : a.bias[expert];
    return gate.key(finite(to_float(row[expert])), bias);
  };

  gate.prepare(
      [&](const auto& f) {
        for (int e = first; e < a.experts; e += kGateThreads) f(finite(to_float(row[e])));
      },
      [&](float value) { return reduce_block(value, -kLargest, Max{}, scratch); },
      [&](float value) {
        __syncthreads();
        return reduce_block(value, 0.0f, Add{}, scratch);
      });
  if constexpr (Gate::kGrouped) {
    for (int g = first; g < gate.groups; g += kGateThreads) {
      uint32_t best = 0, second = 0;
      for (int e = g * gate.group_size; e < (g + 1) * gate.group_size; ++e) {
        gate.keep_two(best, second, key_of(e), 0);
      }
      group_score[g] = gate.group_key(best, second);
    }
    __syncthreads();
    for (int g = first; g < gate.groups; g += kGateThreads) {
      int rank = 0;
      for (int other = 0; other < gate.groups; ++other) {
        rank += gate.precedes(group_score[other], other, group_score[g], g);
      }
      group_kept[g] = rank < gate.topk_group;
    }
    __syncthreads();
  }

  uint64_t previous = ~uint64_t{0};
  float total = 0;  // the same in every thread
  for (int choice = 0; choice < a.routed; ++choice) {
    uint64_t best = 0;
    for (int e = first; e < a.experts; e += kGateThreads) {
      uint32_t key = key_of(e);
      if constexpr (Gate::kGrouped) {
        if (!group_kept[e / gate.group_size]) key = kMasked;
      }
      const uint64_t pair = static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(e);
      if (pair < previous && pair > best) best = pair;
    }
    previous = reduce_block(best, uint64_t{0}, Max{}, pairs);
    __syncthreads();
    const int id = static_cast<int>(~static_cast<uint32_t>(previous));
    const float score = gate.score(finite(to_float(row[id])));
    total += score;
    if (first == 0) {
      weights[choice] = score;
      ids[choice] = id;
    }
  }
  __syncthreads();
  for (int choice = first; choice < a.routed + a.shared; choice += kGateThreads) {
    const float score = choice < a.routed ? weights[choice] : 0.0f;
    weights[choice] = final_weight(a, choice, score, total);
    if (choice >= a.routed) ids[choice] = a.experts + choice - a.routed;
  }
}

template <class Gate, class T, int kPer, bool kVector>
bool launch_gate_lanes(const char* op, const GateRows& a, const Gate& gate, Stream stream) {
  if (a.experts > kRowLanes * kPer || !gate.fits(kPer, a.experts)) return false;
  if (kVector) {
    constexpr int kSize = kGateVector<T, kPer>;
    constexpr int kBiasSize = kGateVector<float, kPer>;
    constexpr uint64_t kBytes = kSize * sizeof(T);
    if (a.experts % kSize != 0 || a.experts % kBiasSize != 0 ||
        reinterpret_cast<uintptr_t>(a.logits) % kBytes != 0 ||
        static_cast<uint64_t>(a.logits_stride) * sizeof(T) % kBytes != 0 ||
        reinterpret_cast<uintptr_t>(a.bias) % (kBiasSize * sizeof(float)) != 0) {
      return false;
    }
  }
  const int64_t blocks = ceil_div(a.tokens, kGateThreads / kRowLanes);
  launch({op, stream, blocks, kGateThreads}, gate_kernel<Gate, T, kPer, kVector>, a, gate);
  return true;
}

template <class Gate>
void launch_gate(const char* op, const GateRows& a, const Gate& gate, Stream stream) {
  for_float_type(a.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool lanes = a.routed + a.shared <= kRowLanes &&
                       (launch_gate_lanes<Gate, T, 2, true>(op, a, gate, stream) ||
                        launch_gate_lanes<Gate, T, 4, true>(op, a, gate, stream) ||
                        launch_gate_lanes<Gate, T, 8, true>(op, a, gate, stream) ||
                        launch_gate_lanes<Gate, T, 12, true>(op, a, gate, stream) ||
                        launch_gate_lanes<Gate, T, 2, false>(op, a, gate, stream) ||
                        launch_gate_lanes<Gate, T, 8, false>(op, a, gate, stream) ||
                        launch_gate_lanes<Gate, T, 16, true>(op, a, gate, stream) ||
                        launch_gate_lanes<Gate, T, 16, false>(op, a, gate, stream));
    if (lanes) return;
    launch({op, stream, a.tokens, kGateThreads}, gate_loop_kernel<Gate, T>, a, gate);
  });
}

}  // namespace opmux::gpu

#endif
