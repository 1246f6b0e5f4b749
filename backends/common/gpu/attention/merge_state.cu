// SPDX-License-Identifier: Apache-2.0
// merge_state(v_a, s_a, v_b, s_b) -> v_merged, s_merged: s = log(exp(s_a) + exp(s_b)),
// v = v_a * exp(s_a - s) + v_b * exp(s_b - s)
#include "gpu.h"

#if OPMUX_KERNEL
#include "rows.cuh"
#include "vec.cuh"
#endif

namespace opmux::gpu {

// One value of (tokens, heads, head_dim), and its log-sum-exp of (tokens, heads).
struct State {
  void* v;
  float* s;
  int64_t v_token, v_head, s_token;  // strides
};
struct Merge {
  State a, b, merged;
  int64_t tokens, heads, head_dim;
  FloatType type;
};

void launch_merge_state(const Merge& merge, Stream stream);

#if OPMUX_KERNEL

constexpr int kMergeThreads = 512;  // 256 and fewer are 1 % slower on an H200

// A side without keys has the weight 0, and its values, which may be NaN, do not count.
struct MergeWeights {
  float a, b, s;
  bool has_a, has_b;
};
__device__ inline MergeWeights merge_weights(float s_a, float s_b) {
  constexpr float kInfinity = __builtin_huge_valf();
  s_a = s_a == kInfinity ? -kInfinity : s_a;
  s_b = s_b == kInfinity ? -kInfinity : s_b;
  const bool a_leads = s_a > s_b;
  float peak = a_leads ? s_a : s_b;
  if (s_a != s_a || s_b != s_b) peak = s_a + s_b;  // NaN
  if (peak == -kInfinity) return {0, 0, -kInfinity, false, false};
  const float ratio = expf((a_leads ? s_b : s_a) - peak), total = 1.0f + ratio;
  const float more = 1.0f / total, less = ratio * more;
  return {a_leads ? more : less, a_leads ? less : more, logf(total) + peak, s_a != -kInfinity,
          s_b != -kInfinity};
}

// A thread a vector.
template <class T, int kSize>
__global__ void __launch_bounds__(kMergeThreads)
    merge_state_kernel(Merge m, Divider width, Divider heads, int64_t first_row, uint32_t vectors) {
  wait_for_previous();
  let_next_start();
  const uint32_t vector = blockIdx.x * kMergeThreads + threadIdx.x;
  if (vector >= vectors) return;
  const Split at = width.split(vector);
  const Split row = heads.split(at.quotient);
  const int64_t token = first_row + row.quotient, head = row.remainder;
  const int64_t column = static_cast<int64_t>(at.remainder) * kSize;
  const auto place = [&](const State& state) {
    return static_cast<T*>(state.v) + token * state.v_token + head * state.v_head + column;
  };
  const Vec<T, kSize> in_a = load<kSize>(place(m.a));
  const Vec<T, kSize> in_b = load<kSize>(place(m.b));
  const MergeWeights w =
      merge_weights(m.a.s[token * m.a.s_token + head], m.b.s[token * m.b.s_token + head]);
  float a[kSize], b[kSize], result[kSize];
  widen(in_a, a);
  widen(in_b, b);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    result[i] = (w.has_a ? a[i] * w.a : 0.0f) + (w.has_b ? b[i] * w.b : 0.0f);
  }
  store_streaming(place(m.merged), narrow<T>(result));
  if (at.remainder == 0) m.merged.s[token * m.merged.s_token + head] = w.s;
}

template <class T, int kSize>
void launch_merge(const Merge& m, Stream stream) {
  const int64_t width = m.head_dim / kSize;
  const int64_t most = ((int64_t{1} << 31) - 1) / (width * m.heads);  // tokens that 31 bits count
  for (int64_t first = 0; first < m.tokens; first += most) {
    const int64_t vectors = (m.tokens - first < most ? m.tokens - first : most) * m.heads * width;
    launch({"merge_state", stream, ceil_div(vectors, kMergeThreads), kMergeThreads},
           merge_state_kernel<T, kSize>, m, Divider(width), Divider(m.heads), first,
           static_cast<uint32_t>(vectors));
  }
}

void launch_merge_state(const Merge& m, Stream stream) {
  for_float_type(m.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kSize = kFull<T>;
    uint64_t strides = m.head_dim;
    uintptr_t data = 0;
    for (const State* state : {&m.a, &m.b, &m.merged}) {
      strides |= state->v_token | state->v_head;
      data |= reinterpret_cast<uintptr_t>(state->v);
    }
    if (strides % kSize == 0 && data % kVectorBytes == 0) {
      launch_merge<T, kSize>(m, stream);
    } else {
      launch_merge<T, 1>(m, stream);
    }
  });
}

#endif

#if OPMUX_LAUNCHER

State state_of(const char* op, const Operand& v, const Operand& s) {
  const Tensor& value = v.tensor;
  check(value.dim() == 3 && s.tensor.dim() == 2, op, "v must be (tokens, heads, head_dim)");
  check(s.tensor.size(0) == value.size(0) && s.tensor.size(1) == value.size(1), op,
        "s must be (tokens, heads)");
  check_float32(op, s.tensor);
  check_last_dim_contiguous(op, value);
  check_last_dim_contiguous(op, s.tensor);
  return {v.data, static_cast<float*>(s.data), value.size(0) > 1 ? value.stride(0) : 0,
          value.size(1) > 1 ? value.stride(1) : 0, s.tensor.stride(0)};
}

void merge_state(const Tensor& v_a, const Tensor& s_a, const Tensor& v_b, const Tensor& s_b,
                 Tensor v_merged, Tensor s_merged) {
  constexpr const char* kOp = "merge_state";
  check_same_device(kOp, v_a, s_a, v_b, s_b, v_merged, s_merged);
  check_same_dtype(kOp, v_a, v_b, v_merged);
  check_same_shape(kOp, v_a, v_b);
  check_same_shape(kOp, v_a, v_merged);
  const FloatType type = float_type(kOp, v_a);
  const Merge merge = {state_of(kOp, reads(v_a), reads(s_a)),
                       state_of(kOp, reads(v_b), reads(s_b)),
                       state_of(kOp, writes(v_merged), writes(s_merged)),
                       v_a.size(0),
                       v_a.size(1),
                       v_a.size(2),
                       type};
  check(merge.head_dim >= 1, kOp, "head_dim must be positive");
  check(merge.heads == 0 || merge.head_dim < kMaxRow / merge.heads, kOp,
        "a token must have fewer than 2**31 elements");
  if (merge.tokens * merge.heads == 0) return;
  const Place place(kOp, v_a);
  launch_merge_state(merge, place.stream());
}
OPMUX_OP(merge_state, merge_state);
#endif

}  // namespace opmux::gpu
