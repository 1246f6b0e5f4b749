// SPDX-License-Identifier: Apache-2.0
// rotary_embedding(positions, query, key, head_dim, cos_sin_cache, is_neox), in place: rotates the
// first rot_dim elements of every head by the angles of its token's position. Neox rotates the
// elements (i, i + rot_dim / 2) together, the interleaved form (2i, 2i + 1).
#include "elementwise.h"
#include "indices.h"

namespace opmux::cpu {
namespace {

struct Heads {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
  int64_t heads;
};

struct Rotation {
  Heads tensors[2];  // query and perhaps key
  int tensor_count;
  Indices positions;
  const void* cos_sin;  // a row per position: cosines, then sines
  int64_t cos_sin_stride;
  bool cos_sin_float32;  // else of the tensors' type
  int64_t half;          // rot_dim / 2
  bool is_neox;
};
using RotationKernel = void(const Rotation&, int64_t token_begin, int64_t token_end);

#if OPMUX_KERNEL

constexpr int64_t kChunk = 256;  // rotations whose angles are kept in the L1 cache

// Angles of one token, converted once for all its heads, in the lane order of the elements.
struct Angles {
  Pair cos[kChunk / kPair], sin[kChunk / kPair];
};

template <class T, bool kNeox, class Count>
OPMUX_INLINE Pair load_angle(const Rotation& a, int64_t offset, Count count) {
  if (a.cos_sin_float32) {
    const Pair v = load_pair(static_cast<const float*>(a.cos_sin) + offset, count);
    return kNeox ? from_consecutive(T{}, v) : v;
  }
  const Pair v = load_pair(static_cast<const T*>(a.cos_sin) + offset, count);
  return kNeox ? v : to_consecutive(T{}, v);
}

OPMUX_INLINE void rotate(Pair* x, Pair* y, Pair c, Pair s) {
  const Pair old = *x;
  *x = {fma(old.a, c.a, -(y->a * s.a)), fma(old.b, c.b, -(y->b * s.b))};
  *y = {fma(y->a, c.a, old.a * s.a), fma(y->b, c.b, old.b * s.b)};
}

template <class T, class Count>
OPMUX_INLINE void rotate_neox(T* x, T* y, Pair c, Pair s, Count count) {
  Pair u = load_pair(x, count), v = load_pair(y, count);
  rotate(&u, &v, c, s);
  store_pair(x, u, count);
  store_pair(y, v, count);
}

template <class T, class Count>
OPMUX_INLINE void rotate_interleaved(T* x, Pair c, Pair s, Count low, Count high) {
  const Pair first = to_even_odd(T{}, load_pair(x, low));
  const Pair second = to_even_odd(T{}, load_pair(x + kPair, high));
  Pair u = {first.a, second.a}, v = {first.b, second.b};
  rotate(&u, &v, c, s);
  store_pair(x, from_even_odd(T{}, {u.a, v.a}), low);
  store_pair(x + kPair, from_even_odd(T{}, {u.b, v.b}), high);
}
template <class T>
OPMUX_INLINE void rotate_interleaved(T* x, Pair c, Pair s, Full full) {
  rotate_interleaved(x, c, s, full, full);
}
template <class T>
OPMUX_INLINE void rotate_interleaved(T* x, Pair c, Pair s, int count) {
  const int low = 2 * count < kPair ? 2 * count : kPair;
  rotate_interleaved(x, c, s, low, 2 * count - low);
}

template <class T, bool kNeox>
void rotate_tokens(const Rotation& a, int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t row = a.positions[token] * a.cos_sin_stride;
    for (int64_t begin = 0; begin < a.half; begin += kChunk) {
      const int64_t n = a.half - begin < kChunk ? a.half - begin : kChunk;
      Angles angles;
      for_pairs(0, n, [&](int64_t i, auto count) {
        angles.cos[i / kPair] = load_angle<T, kNeox>(a, row + begin + i, count);
        angles.sin[i / kPair] = load_angle<T, kNeox>(a, row + a.half + begin + i, count);
      });
      for (int k = 0; k < a.tensor_count; ++k) {
        const Heads& t = a.tensors[k];
        for (int64_t h = 0; h < t.heads; ++h) {
          T* head = static_cast<T*>(t.data) + token * t.token_stride + h * t.head_stride;
          for_pairs(0, n, [&](int64_t i, auto count) {
            const Pair c = angles.cos[i / kPair], s = angles.sin[i / kPair];
            T* x = head + (kNeox ? 1 : 2) * (begin + i);
            if constexpr (kNeox) {
              rotate_neox(x, x + a.half, c, s, count);
            } else {
              rotate_interleaved(x, c, s, count);
            }
          });
        }
      }
    }
  }
}

template <class T>
void rotary_embedding_tokens(const Rotation& a, int64_t token_begin, int64_t token_end) {
  return a.is_neox ? rotate_tokens<T, true>(a, token_begin, token_end)
                   : rotate_tokens<T, false>(a, token_begin, token_end);
}

#endif

OPMUX_FLOAT_KERNELS(rotary_embedding_kernels, RotationKernel, rotary_embedding_tokens);

#if OPMUX_LAUNCHER

constexpr const char* kOp = "rotary_embedding";

// (T, heads * head_dim) or (T, heads, head_dim)
Heads heads_of(const Tensor& t, int64_t tokens, int64_t head_dim) {
  check(t.dim() == 2 || t.dim() == 3, kOp, "query and key must have 2 or 3 dimensions");
  check(t.size(0) == tokens, kOp, "there must be one position per token");
  check_last_dim_contiguous(kOp, t);
  if (t.dim() == 3) {
    check(t.size(2) == head_dim, kOp, "last dimension must be head_dim");
    return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.size(1)};
  }
  check(t.size(1) % head_dim == 0, kOp, "row must be a multiple of head_dim");
  return {t.mutable_data_ptr(), t.stride(0), head_dim, t.size(1) / head_dim};
}

void rotary_embedding(const Tensor& positions, Tensor query, std::optional<Tensor> key,
                      int64_t head_dim, const Tensor& cos_sin_cache, bool is_neox) {
  const FloatType type = float_type(kOp, query);
  check_same_device(kOp, positions, query, cos_sin_cache);
  check(head_dim > 0, kOp, "head_dim must be positive");
  check(cos_sin_cache.dim() == 2, kOp, "cos_sin_cache must have 2 dimensions");
  check_last_dim_contiguous(kOp, cos_sin_cache);
  const int64_t rot_dim = cos_sin_cache.size(1);
  check(rot_dim % 2 == 0 && rot_dim <= head_dim, kOp, "rot_dim must be even and at most head_dim");
  const FloatType cache_type = float_type(kOp, cos_sin_cache);
  check(cache_type == FloatType::kFloat32 || cache_type == type, kOp,
        "cos_sin_cache must be float32 or of query's dtype");

  const int64_t tokens = positions.numel();
  Rotation a = {};
  a.tensors[a.tensor_count++] = heads_of(query, tokens, head_dim);
  if (key) {
    check_same_device(kOp, query, *key);
    check_same_dtype(kOp, query, *key);
    a.tensors[a.tensor_count++] = heads_of(*key, tokens, head_dim);
  }
  a.positions = indices_of(kOp, positions, tokens);
  check_range(kOp, a.positions, tokens, 0, cos_sin_cache.size(0), "position out of range");
  a.cos_sin = cos_sin_cache.const_data_ptr();
  a.cos_sin_stride = cos_sin_cache.stride(0);
  a.cos_sin_float32 = cache_type == FloatType::kFloat32;
  a.half = rot_dim / 2;
  a.is_neox = is_neox;

  RotationKernel* kernel = rotary_embedding_kernels.get(type);
  const int64_t heads = a.tensors[0].heads + a.tensors[1].heads;
  const int64_t token_bytes = 2 * heads * rot_dim * static_cast<int64_t>(query.element_size());
  parallel(tokens, token_bytes, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}
OPMUX_OP(rotary_embedding, rotary_embedding);

#endif

}  // namespace
}  // namespace opmux::cpu
