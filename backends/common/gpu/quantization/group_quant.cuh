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
    in[0] = load_streaming<kSize>(x);
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
    in[0] = load_streaming<kSize>(x);
    in[1] = load_streaming<kSize>(x + width);
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

// kLanes lanes hold a group: each kPieces vectors of it.
template <class T, int kLanesOfGroup>
struct HeldGroup {
  static constexpr int kLanes = kLanesOfGroup, kPieces = 2, kSize = kFull<T>;

  template <class Value, class Q>
  static __device__ float quantize(const T* x, uint8_t* q, const Group& g, int lane) {
    Vec<T, kSize> in[kPieces][Value::kIn];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      Value::read(x + (p * kLanes + lane) * kSize, g.width, in[p]);
    }
    float value[kPieces][kSize];
    float found = 0;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      Value::compute(in[p], value[p]);
      found = largest(found, value[p]);
    }
    const Scale scale = scale_of<Q>(reduce_lanes<kLanes>(found, Largest{}), g.power_of_two);
    if (g.writes) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        store_quantized<Q>(q + (p * kLanes + lane) * kSize, value[p], scale.inverse);
      }
    }
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
  Divider slots_of_token;  // groups and the padding behind them
  uint32_t slots;
};

constexpr int kGroupQuantThreads = 256;

// Quantises the group of a slot and writes its scale, or writes the padding that the slot stands
// for. Slots behind the last one do nothing; all lanes of a warp call it.
template <class Value, class T, class Q, class Grouping>
__device__ inline void quantize_slot(const GroupQuantArgs& a, uint32_t slot, uint32_t slots) {
  const int lane = static_cast<int>(threadIdx.x) % Grouping::kLanes;
  const Split at = a.slots_of_token.split(slot < slots ? slot : slots - 1);
  const int64_t token = at.quotient, group = at.remainder;
  const int64_t last_token = a.scales.tokens - 1, last_group = a.scales.groups - 1;
  const bool exists = token <= last_token && group <= last_group;
  const int64_t row = token < last_token ? token : last_token;
  const int64_t column = (group < last_group ? group : last_group) * a.group_size;
  const Group g = {a.width, a.group_size, a.scales.layout == kPackedScales, exists && slot < slots};
  const float scale =
      Grouping::template quantize<Value, Q>(static_cast<const T*>(a.x) + row * a.x_stride + column,
                                            a.q + row * a.q_stride + column, g, lane);
  if (lane == 0 && slot < slots) write_scale(a.scales, token, group, exists ? scale : 0.0f);
}

template <class Value, class T, class Q, class Grouping>
__global__ void __launch_bounds__(kGroupQuantThreads) group_quant_kernel(GroupQuantArgs a) {
  constexpr int kGroups = kGroupQuantThreads / Grouping::kLanes;
  wait_for_previous();
  let_next_start();
  quantize_slot<Value, T, Q, Grouping>(a, blockIdx.x * kGroups + threadIdx.x / Grouping::kLanes,
                                       a.slots);
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

// Whether rows of x and out_q allow full vectors; the second half of a row of x begins at `width`.
template <class T>
bool aligned_groups(const void* x, int64_t x_stride, const QuantizedRows& out) {
  constexpr int kSize = kFull<T>;
  return aligned_to(x, x_stride, sizeof(T), kVectorBytes) && out.width % kSize == 0 &&
         aligned_to(out.q, out.stride, 1, kSize);
}

constexpr int64_t kMaxSlots = (int64_t{1} << 31) - 1;

template <class Value>
void launch_group_quant(const char* op, const GroupQuantRows& in, Stream stream) {
  const auto run = [&](auto type_tag, auto quantized_tag) {
    using T = typename decltype(type_tag)::Type;
    using Q = typename decltype(quantized_tag)::Type;
    const bool aligned = aligned_groups<T>(in.x, in.x_stride, in.out);
    for_grouping<T>(in.out.group_size, aligned, [&](auto grouping_tag) {
      using Grouping = typename decltype(grouping_tag)::Type;
      const int64_t groups = in.out.scales.padded_groups();
      for_tokens(in.out, kMaxSlots / groups - 3, [&](int64_t first, const QuantizedRows& out) {
        const T* x = static_cast<const T*>(in.x) + first * in.x_stride;
        const int64_t slots = (out.scales.tokens + out.scales.padding) * groups;
        const GroupQuantArgs a = {x,
                                  in.x_stride,
                                  static_cast<uint8_t*>(out.q),
                                  out.stride,
                                  out.scales,
                                  out.width,
                                  out.group_size,
                                  Divider(groups),
                                  static_cast<uint32_t>(slots)};
        const int64_t blocks = ceil_div(slots, kGroupQuantThreads / Grouping::kLanes);
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
