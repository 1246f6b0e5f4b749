// SPDX-License-Identifier: Apache-2.0
// The kernels of group quantisation. A few lanes share a group: what they read stays in registers
// between the maximum and the rounding. Groups of any other size are read twice, by kQuantLanes.
#pragma once

#include "quantization/group_quant.h"

#if OPMUX_KERNEL

#include "math.cuh"
#include "quantization/quantize.cuh"
#include "rows.cuh"

namespace opmux::gpu {

// What is quantised: x, or the gate of the two halves of its row, which lie `width` apart.
struct PlainValue {
  static constexpr int kIn = 1;

  template <class T, int kSize>
  static __device__ void read(const T* x, int64_t, Vec<T, kSize> (&in)[kIn]) {
    in[0] = load<kSize>(x);
  }
  template <class T, int kSize>
  static __device__ void compute(const Vec<T, kSize> (&in)[kIn], float (&value)[kSize]) {
    widen(in[0], value);
  }
};

struct SiluAndMulValue {
  static constexpr int kIn = 2;

  template <class T, int kSize>
  static __device__ void read(const T* x, int64_t width, Vec<T, kSize> (&in)[kIn]) {
    in[0] = load<kSize>(x);
    in[1] = load<kSize>(x + width);
  }
  template <class T, int kSize>
  static __device__ void compute(const Vec<T, kSize> (&in)[kIn], float (&value)[kSize]) {
    float up[kSize];
    widen(in[0], value);
    widen(in[1], up);
#pragma unroll
    for (int i = 0; i < kSize; ++i) value[i] = value[i] * sigmoid(value[i]) * up[i];
  }
};

struct Group {
  int64_t width;  // of the row of out_q
  int64_t size;
  bool power_of_two;
  bool writes;  // lanes without a group of their own read one with the others
};

// kLanes lanes hold a group, each two vectors that adjoin and are stored as one.
template <class T, int kLanesOfGroup>
struct HeldGroup {
  static constexpr int kLanes = kLanesOfGroup, kSize = kFull<T>, kHeld = 2 * kSize;

  template <class Value, class Q>
  static __device__ float quantize(const T* x, uint8_t* q, const Group& g, int lane) {
    Vec<T, kSize> in[2][Value::kIn];
    Value::read(x + lane * kHeld, g.width, in[0]);
    Value::read(x + lane * kHeld + kSize, g.width, in[1]);
    float value[kHeld];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float half[kSize];
      Value::compute(in[h], half);
#pragma unroll
      for (int i = 0; i < kSize; ++i) value[h * kSize + i] = half[i];
    }
    const float found = reduce_lanes<kLanes>(largest(0.0f, value), Largest{});
    const Scale scale = scale_of<Q>(found, g.power_of_two);
    if (g.writes) store_quantized<Q>(q + lane * kHeld, value, scale.inverse);
    return scale.value;
  }
};

// A group of any multiple of kVector values, read twice.
template <class T, int kVector>
struct AnyGroup {
  static constexpr int kLanes = kQuantLanes, kSize = kVector;

  template <class Value, class Q>
  static __device__ float quantize(const T* x, uint8_t* q, const Group& g, int lane) {
    Vec<T, kSize> in[Value::kIn];
    float value[kSize];
    float found = 0;
    for (int64_t i = lane * kSize; i < g.size; i += kLanes * kSize) {
      Value::read(x + i, g.width, in);
      Value::compute(in, value);
      found = largest(found, value);
    }
    const Scale scale = scale_of<Q>(reduce_lanes<kLanes>(found, Largest{}), g.power_of_two);
    for (int64_t i = lane * kSize; g.writes && i < g.size; i += kLanes * kSize) {
      Value::read(x + i, g.width, in);
      Value::compute(in, value);
      store_quantized<Q>(q + i, value, scale.inverse);
    }
    return scale.value;
  }
};

struct GroupQuantArgs {
  const void* x;
  int64_t x_stride;
  uint8_t* q;
  int64_t q_stride;
  ScalesOf scales;
  int64_t width, group_size;
  uint32_t tokens, groups;  // that exist
  Divider slots_of_token;   // groups and the padding behind them
  uint32_t slots;
};

constexpr int kGroupQuantThreads = 256;

// Quantises the group of a slot and writes its scale, or writes the padding that the slot stands
// for. All lanes of a warp call it; those that do not write read with the others.
template <class Value, class T, class Q, class Grouping>
__device__ inline void quantize_slot(const GroupQuantArgs& a, uint32_t slot, bool writes) {
  const int lane = static_cast<int>(threadIdx.x % Grouping::kLanes);
  const Split at = a.slots_of_token.split(slot);
  const uint32_t token = at.quotient, group = at.remainder;
  const bool exists = token < a.tokens && group < a.groups;
  const int64_t row = token < a.tokens ? token : a.tokens - 1;
  const int64_t column = (group < a.groups ? group : a.groups - 1) * a.group_size;
  const Group g = {a.width, a.group_size, a.scales.layout == kPackedScales, exists && writes};
  const float scale =
      Grouping::template quantize<Value, Q>(static_cast<const T*>(a.x) + row * a.x_stride + column,
                                            a.q + row * a.q_stride + column, g, lane);
  if (lane == 0 && writes) write_scale(a.scales, token, group, exists ? scale : 0.0f);
}

template <class Value, class T, class Q, class Grouping>
__global__ void __launch_bounds__(kGroupQuantThreads) group_quant_kernel(GroupQuantArgs a) {
  constexpr int kGroups = kGroupQuantThreads / Grouping::kLanes;
  wait_for_previous();
  let_next_start();
  const uint32_t slot = blockIdx.x * kGroups + threadIdx.x / Grouping::kLanes;
  const bool exists = slot < a.slots;
  quantize_slot<Value, T, Q, Grouping>(a, exists ? slot : a.slots - 1, exists);
}

// Calls f(tag), whose Type is the grouping: held in registers by 2 to 16 lanes where the size and
// the alignment allow.
template <class T, class F>
void for_grouping(int64_t group_size, bool aligned, const F& f) {
  constexpr int kSize = kFull<T>;
  const int64_t vectors = group_size / kSize;
  if (!aligned || group_size % kSize != 0) return f(TypeTag<AnyGroup<T, 1>>{});
  if (vectors == 4) return f(TypeTag<HeldGroup<T, 2>>{});
  if (vectors == 8) return f(TypeTag<HeldGroup<T, 4>>{});
  if (vectors == 16) return f(TypeTag<HeldGroup<T, 8>>{});
  if (vectors == 32) return f(TypeTag<HeldGroup<T, 16>>{});
  f(TypeTag<AnyGroup<T, kSize>>{});
}

// Bytes that a lane stores at a time: a held group's lane all that it holds.
template <class T>
int store_bytes(int64_t group_size) {
  return group_size % (2 * kFull<T>) == 0 ? 2 * kFull<T> : kFull<T>;
}

// Whether rows of x and out_q allow vectors; the second half of a row of x begins at `width`.
template <class T>
bool aligned_groups(const void* x, int64_t x_stride, const QuantizedRows& out) {
  return aligned_to(x, x_stride, sizeof(T), kVectorBytes) && out.width % kFull<T> == 0 &&
         aligned_to(out.q, out.stride, 1, store_bytes<T>(out.group_size));
}

constexpr int64_t kMaxSlots = (int64_t{1} << 31) - 1;

// Calls f(first, args) for runs of tokens with at most `limit` slots, the padding not counted.
template <class T, class F>
void for_slots(const GroupQuantRows& in, int64_t limit, const F& f) {
  const int64_t groups = in.out.scales.padded_groups();
  for_tokens(in.out, limit / groups, [&](int64_t first, const QuantizedRows& out) {
    const ScalesOf& scales = out.scales;
    f(first, GroupQuantArgs{static_cast<const T*>(in.x) + first * in.x_stride, in.x_stride,
                            static_cast<uint8_t*>(out.q), out.stride, scales, out.width,
                            out.group_size, static_cast<uint32_t>(scales.tokens),
                            static_cast<uint32_t>(scales.groups), Divider(groups),
                            static_cast<uint32_t>((scales.tokens + scales.padding) * groups)});
  });
}

template <class Value>
void launch_group_quant(const char* op, const GroupQuantRows& in, Stream stream) {
  const auto run = [&](auto type_tag, auto quantized_tag) {
    using T = typename decltype(type_tag)::Type;
    using Q = typename decltype(quantized_tag)::Type;
    const bool aligned = aligned_groups<T>(in.x, in.x_stride, in.out);
    for_grouping<T>(in.out.group_size, aligned, [&](auto grouping_tag) {
      using Grouping = typename decltype(grouping_tag)::Type;
      for_slots<T>(in, kMaxSlots - 3 * kMaxGroups, [&](int64_t, const GroupQuantArgs& a) {
        const int64_t blocks = ceil_div(a.slots, kGroupQuantThreads / Grouping::kLanes);
        launch({op, stream, blocks, kGroupQuantThreads}, group_quant_kernel<Value, T, Q, Grouping>,
               a);
      });
    });
  };
  for_float_type(in.type, [&](auto type_tag) {
    for_quantized_type(in.out.int8, [&](auto quantized_tag) { run(type_tag, quantized_tag); });
  });
}

}  // namespace opmux::gpu

#endif
