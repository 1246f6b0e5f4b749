// SPDX-License-Identifier: Apache-2.0
// What the quantising ops share between tensors and kernels: where quantised rows and their scales
// go, and the checks of both.
#pragma once

#include "gpu.h"

namespace opmux::gpu {

// As the ops' scale_layout: (T, G) float32, (G, T4) float32, (ceil(G / 4), T4) int32 of exponents
enum ScaleLayout : int { kRowScales, kColumnScales, kPackedScales };

// Four padded tokens of fewer groups are counted in 31 bits.
constexpr int64_t kMaxGroups = int64_t{1} << 28;

// Where the scales of tokens 0 to `tokens` go.
struct ScalesOf {
  void* data;
  int64_t stride;   // of the first dimension, in elements
  int64_t tokens;   // that exist
  int64_t padding;  // tokens behind them, which get 0
  int64_t groups;   // a token
  int layout;

  // Groups a token with the padding.
  int64_t padded_groups() const { return layout == kPackedScales ? (groups + 3) / 4 * 4 : groups; }
};

struct QuantizedRows {
  void* q;
  int64_t stride;
  ScalesOf scales;
  int64_t width;
  int64_t group_size;  // the width where a row has one scale
  bool int8;
};

// Calls f(first, out) for runs of at most `limit` tokens: kernels count within one in 31 bits.
template <class F>
void for_tokens(const QuantizedRows& out, int64_t limit, const F& f) {
  const ScalesOf& all = out.scales;
  for (int64_t first = 0; first < all.tokens; first += limit) {
    QuantizedRows part = out;
    part.q = static_cast<uint8_t*>(out.q) + first * out.stride;
    const int64_t step = all.layout == kRowScales ? all.stride : 1;
    part.scales.data = static_cast<float*>(all.data) + first * step;
    const int64_t left = all.tokens - first;
    part.scales.tokens = left < limit ? left : limit;
    part.scales.padding = left <= limit ? all.padding : 0;
    f(first, part);
  }
}

#if OPMUX_LAUNCHER

// A single row may have any stride.
inline int64_t row_stride(const Tensor& t, int64_t dim = 0) {
  return t.size(dim) > 1 ? t.stride(dim) : 0;
}

inline void check_size(const char* op, const Tensor& t, int64_t dim, int64_t size,
                       const char* rule) {
  check(t.size(dim) == size, op, rule);
}

inline void check_quantized(const char* op, const Tensor& q, bool int8) {
  const int32_t wanted = int8 ? aoti_torch_dtype_int8() : aoti_torch_dtype_float8_e4m3fn();
  check(dtype_of(q) == wanted, op, int8 ? "out_q must be int8" : "out_q must be float8_e4m3fn");
}

// Checks the last two dimensions of out_scale.
inline ScalesOf group_scales(const char* op, const Tensor& scale, int64_t tokens, int64_t width,
                             int64_t group_size, int64_t layout) {
  check(group_size >= 1 && width % group_size == 0, op, "group_size must divide the width");
  check(layout >= kRowScales && layout <= kPackedScales, op, "scale_layout must be 0, 1 or 2");
  const bool packed = layout == kPackedScales;
  const int32_t wanted = packed ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32();
  check(dtype_of(scale) == wanted, op, "out_scale has another dtype");
  const int64_t groups = width / group_size, padded = (tokens + 3) / 4 * 4;
  check(groups < kMaxGroups, op, "a row must have fewer than 2**28 groups");
  const int64_t dims = scale.dim();
  const char* const rule = "out_scale has another shape";
  if (layout == kRowScales) {
    check_size(op, scale, dims - 2, tokens, rule);
    check_size(op, scale, dims - 1, groups, rule);
  } else {
    check_size(op, scale, dims - 2, packed ? (groups + 3) / 4 : groups, rule);
    check_size(op, scale, dims - 1, padded, rule);
  }
  return {scale.mutable_data_ptr(),
          row_stride(scale, dims - 2),
          tokens,
          layout == kRowScales ? 0 : padded - tokens,
          groups,
          static_cast<int>(layout)};
}

inline void check_out_q(const char* op, const Tensor& q, int64_t tokens, int64_t width, bool int8) {
  check(q.dim() == 2 && q.size(0) == tokens && q.size(1) == width, op, "out_q has another shape");
  check_quantized(op, q, int8);
  check_row(op, width);
}

// Outputs of (T, width) values with a scale for each group.
inline QuantizedRows group_rows(const char* op, const Tensor& q, const Tensor& scale,
                                int64_t tokens, int64_t width, int64_t group_size, bool int8,
                                int64_t layout) {
  check_out_q(op, q, tokens, width, int8);
  check(scale.dim() == 2, op, "out_scale must have two dimensions");
  const ScalesOf scales = group_scales(op, scale, tokens, width, group_size, layout);
  return {q.mutable_data_ptr(), row_stride(q), scales, width, group_size, int8};
}

// Outputs of (T, width) values with a scale for each token.
inline QuantizedRows token_rows(const char* op, const Tensor& q, const Tensor& scale,
                                int64_t tokens, int64_t width, bool int8) {
  check_out_q(op, q, tokens, width, int8);
  check_float32(op, scale);
  check(scale.dim() == 2 && scale.size(0) == tokens && scale.size(1) == 1, op,
        "out_scale must have shape (T, 1)");
  const ScalesOf scales = {scale.mutable_data_ptr(), row_stride(scale), tokens, 0, 1, kRowScales};
  return {q.mutable_data_ptr(), row_stride(q), scales, width, width, int8};
}

#endif

}  // namespace opmux::gpu
