// SPDX-License-Identifier: Apache-2.0
// What the rotary ops share between tensors and kernels: positions, the cache of angles, heads.
#pragma once

#include "gpu.h"
#include "indices.h"

namespace opmux::gpu {

// Heads of head_dim elements; strides count elements.
struct RotaryHeads {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
  int64_t heads;  // 0: there is no such tensor
};

// The rotation of the tokens' heads: of the elements (i, i + half) together in the neox style, of
// (2i, 2i + 1) otherwise.
struct Rotary {
  Indices positions;
  int64_t position_stride;  // between the rows of time, height and width, where there are three
  int64_t tokens;
  int64_t max_position;
  const void* cos_sin;  // a row per position: `half` cosines, then as many sines
  int64_t cos_sin_stride;
  int64_t half;
  bool cos_sin_float32;  // else of the heads' type
  bool is_neox;
  FloatType type;  // of the heads
};

#if OPMUX_LAUNCHER

// All but the positions.
inline Rotary rotary_of(const char* op, const Tensor& heads, int64_t tokens, int64_t head_dim,
                        const Tensor& cos_sin_cache, bool is_neox) {
  Rotary a = {};
  a.type = float_type(op, heads);
  check_same_device(op, heads, cos_sin_cache);
  check(head_dim > 0, op, "head_dim must be positive");
  check(cos_sin_cache.dim() == 2, op, "cos_sin_cache must have 2 dimensions");
  check_last_dim_contiguous(op, cos_sin_cache);
  const int64_t rot_dim = cos_sin_cache.size(1);
  check(rot_dim % 2 == 0 && rot_dim <= head_dim, op, "rot_dim must be even and at most head_dim");
  const FloatType cache_type = float_type(op, cos_sin_cache);
  check(cache_type == FloatType::kFloat32 || cache_type == a.type, op,
        "cos_sin_cache must be float32 or of the heads' dtype");
  a.tokens = tokens;
  a.max_position = cos_sin_cache.size(0);
  a.cos_sin = cos_sin_cache.const_data_ptr();
  a.cos_sin_stride = cos_sin_cache.stride(0);
  a.half = rot_dim / 2;
  a.cos_sin_float32 = cache_type == FloatType::kFloat32;
  a.is_neox = is_neox;
  return a;
}

#endif

}  // namespace opmux::gpu
