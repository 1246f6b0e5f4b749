// SPDX-License-Identifier: Apache-2.0
// rotary_embedding(positions, query, key, head_dim, cos_sin_cache, is_neox), in place: rotates the
// first rot_dim elements of every head by the angles of its token's position. Neox rotates the
// elements (i, i + rot_dim / 2) together, the interleaved form (2i, 2i + 1).
#include "gpu.h"
#include "indices.h"

namespace opmux::gpu {

struct Heads {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
  int64_t heads;
};

struct Rotation {
  Heads query, key;  // key may have no heads
  Indices positions;
  int64_t tokens;
  int64_t max_position;
  const void* cos_sin;  // a row per position: cosines, then sines
  int64_t cos_sin_stride;
  bool cos_sin_float32;  // else of the tensors' type
  int64_t half;          // rot_dim / 2
  bool is_neox;
  FloatType type;
};
void launch_rotary_embedding(const Rotation& a, Stream stream);

}  // namespace opmux::gpu

#if OPMUX_KERNEL

#include "rows.cuh"
#include "vec.cuh"

namespace opmux::gpu {
namespace {

constexpr int kThreads = 256;

// How the threads of a block share the heads of a token: lane c of a head rotates the pairs
// [c * kSize, (c + 1) * kSize), so that a thread keeps its angles for all its heads.
struct Sharing {
  Divider lanes;  // threads a head
  int columns;    // vectors in half a head; more than lanes in very wide heads
  int heads;      // at a time
  Divider parts;  // blocks a token
};

template <class C, int kSize>
__device__ inline void load_angles(const void* from, int64_t offset, float (&angle)[kSize]) {
  constexpr int kPart = kSize < kFull<C> ? kSize : kFull<C>;
  const C* data = static_cast<const C*>(from) + offset;
#pragma unroll
  for (int i = 0; i < kSize; i += kPart) {
    float part[kPart];
    widen(load<kPart>(data + i), part);
#pragma unroll
    for (int j = 0; j < kPart; ++j) angle[i + j] = part[j];
  }
}

// kSize pairs of a head: two vectors that lie apart (neox) or side by side.
template <class T, int kSize, bool kNeox>
struct Pairs {
  Vec<T, kSize> low, high;

  static __device__ int64_t second(int64_t half) { return kNeox ? half : kSize; }
  __device__ void read(const T* from, int64_t half) {
    low = load<kSize>(from);
    high = load<kSize>(from + second(half));
  }
  __device__ void write(T* to, int64_t half) const {
    store(to, low);
    store(to + second(half), high);
  }
  __device__ void rotate(const float (&cos)[kSize], const float (&sin)[kSize]) {
    float v[2 * kSize], first[kSize], last[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      v[i] = to_float(low.item[i]);
      v[kSize + i] = to_float(high.item[i]);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int a = kNeox ? i : 2 * i, b = kNeox ? kSize + i : 2 * i + 1;
      const float x = v[a], y = v[b];
      v[a] = x * cos[i] - y * sin[i];
      v[b] = y * cos[i] + x * sin[i];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      first[i] = v[i];
      last[i] = v[kSize + i];
    }
    low = narrow<T>(first);
    high = narrow<T>(last);
  }
};

// C is the type of the angles. A block rotates the heads of one token, or a part of them.
template <class T, class C, int kSize, bool kNeox, int kUnroll>
__global__ void __launch_bounds__(kThreads) rotate_kernel(Rotation a, Sharing s) {
  wait_for_previous();
  let_next_start();
  const Split block = s.parts.split(blockIdx.x);
  const Split place = s.lanes.split(threadIdx.x);
  const int64_t token = block.quotient;
  const int64_t position = a.positions.at(token);
  if (position < 0 || position >= a.max_position) return;
  if (static_cast<int>(place.quotient) >= s.heads) return;
  const int all = static_cast<int>(a.query.heads + a.key.heads);
  const int begin = static_cast<int>(block.remainder) * s.heads + static_cast<int>(place.quotient);
  const int step = s.heads * static_cast<int>(s.parts.divisor);
  const auto head_at = [&](int head, int64_t column) {
    const bool is_query = head < a.query.heads;
    const Heads& t = is_query ? a.query : a.key;
    const int64_t index = is_query ? head : head - a.query.heads;
    return static_cast<T*>(t.data) + token * t.token_stride + index * t.head_stride +
           column * (kNeox ? 1 : 2);
  };
  for (int c = static_cast<int>(place.remainder); c < s.columns;
       c += static_cast<int>(s.lanes.divisor)) {
    const int64_t column = static_cast<int64_t>(c) * kSize;
    const int64_t row = position * a.cos_sin_stride + column;
    float cos[kSize], sin[kSize];
    load_angles<C>(a.cos_sin, row, cos);
    load_angles<C>(a.cos_sin, row + a.half, sin);
    for (int head = begin; head < all; head += kUnroll * step) {
      Pairs<T, kSize, kNeox> pairs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (head + u * step < all) pairs[u].read(head_at(head + u * step, column), a.half);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (head + u * step >= all) break;
        pairs[u].rotate(cos, sin);
        pairs[u].write(head_at(head + u * step, column), a.half);
      }
    }
  }
}

template <class T, class C, int kSize, bool kNeox>
void rotate(const Rotation& a, Stream stream) {
  const int64_t heads = a.query.heads + a.key.heads, columns = a.half / kSize;
  const int64_t lanes = columns < kThreads ? columns : kThreads;
  const int64_t passes = ceil_div(heads, kThreads / lanes);
  // Few tokens: a block for each pass rather than one after the other.
  const bool few = a.tokens * kThreads * 4 < resident_threads();
  const int64_t parts = few ? passes : 1;
  const Sharing s = {Divider(lanes), static_cast<int>(columns),
                     static_cast<int>(ceil_div(heads, passes)), Divider(parts)};
  const int threads = static_cast<int>(round_up(lanes * s.heads, kBlockUnit));
  const Launch at = {"rotary_embedding", stream, a.tokens * parts, threads};
  if (passes == parts) return launch(at, rotate_kernel<T, C, kSize, kNeox, 1>, a, s);
  if (passes == 2) return launch(at, rotate_kernel<T, C, kSize, kNeox, 2>, a, s);
  launch(at, rotate_kernel<T, C, kSize, kNeox, 3>, a, s);
}

template <class T, class C>
void rotate(const Rotation& a, Stream stream) {
  uint64_t all = static_cast<uint64_t>(a.cos_sin_stride * static_cast<int64_t>(sizeof(C))) |
                 reinterpret_cast<uintptr_t>(a.cos_sin);
  for (const Heads& t : {a.query, a.key}) {
    if (t.heads == 0) continue;
    all |=
        static_cast<uint64_t>((t.token_stride | t.head_stride) * static_cast<int64_t>(sizeof(T))) |
        reinterpret_cast<uintptr_t>(t.data);
  }
  if (all % kVectorBytes == 0 && a.half % kFull<T> == 0) {
    return a.is_neox ? rotate<T, C, kFull<T>, true>(a, stream)
                     : rotate<T, C, kFull<T>, false>(a, stream);
  }
  a.is_neox ? rotate<T, C, 1, true>(a, stream) : rotate<T, C, 1, false>(a, stream);
}

}  // namespace

void launch_rotary_embedding(const Rotation& a, Stream stream) {
  for_float_type(a.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    a.cos_sin_float32 ? rotate<T, float>(a, stream) : rotate<T, T>(a, stream);
  });
}

}  // namespace opmux::gpu

#endif

#if OPMUX_LAUNCHER

namespace opmux::gpu {
namespace {

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
  Rotation a = {};
  a.type = float_type(kOp, query);
  check_same_device(kOp, query, positions, cos_sin_cache);
  check(head_dim > 0, kOp, "head_dim must be positive");
  check(cos_sin_cache.dim() == 2, kOp, "cos_sin_cache must have 2 dimensions");
  check_last_dim_contiguous(kOp, cos_sin_cache);
  const int64_t rot_dim = cos_sin_cache.size(1);
  check(rot_dim % 2 == 0 && rot_dim <= head_dim, kOp, "rot_dim must be even and at most head_dim");
  const FloatType cache_type = float_type(kOp, cos_sin_cache);
  check(cache_type == FloatType::kFloat32 || cache_type == a.type, kOp,
        "cos_sin_cache must be float32 or of query's dtype");
  a.tokens = positions.numel();
  a.positions = indices_of(kOp, positions, a.tokens);
  a.query = heads_of(query, a.tokens, head_dim);
  if (key) {
    check_same_device(kOp, query, *key);
    check_same_dtype(kOp, query, *key);
    a.key = heads_of(*key, a.tokens, head_dim);
  }
  a.max_position = cos_sin_cache.size(0);
  a.cos_sin = cos_sin_cache.const_data_ptr();
  a.cos_sin_stride = cos_sin_cache.stride(0);
  a.cos_sin_float32 = cache_type == FloatType::kFloat32;
  a.half = rot_dim / 2;
  a.is_neox = is_neox;
  check_row(kOp, (a.query.heads + a.key.heads) * head_dim);
  if (a.tokens == 0 || a.half == 0 || a.query.heads + a.key.heads == 0) return;
  const Place place(kOp, query);
  launch_rotary_embedding(a, place.stream());
}
OPMUX_OP(rotary_embedding, rotary_embedding);

}  // namespace
}  // namespace opmux::gpu

#endif
