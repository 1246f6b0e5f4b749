// SPDX-License-Identifier: Apache-2.0
// What rotary_embedding and mrope share: the heads of query and key rotated in place.
#pragma once

#include "position/rotary.h"

#if OPMUX_KERNEL

#include "position/rotary.cuh"

namespace opmux::gpu {
namespace {

template <class T, class C, class Position, int kSize, bool kNeox, int kUnroll>
__global__ void __launch_bounds__(kRotaryThreads, 6)
    rotate_kernel(Rotary a, RotaryHeads query, RotaryHeads key, typename Position::Rule rule,
                  int groups, Sharing s) {
  wait_for_previous();
  let_next_start();
  const Share mine(s, a.tokens);
  if (!mine.exists || mine.group >= groups) return;
  const Position position(a, rule, mine.token);
  int64_t pair = static_cast<int64_t>(mine.lane) * kSize;
  do {
    T* at[kUnroll];
    Vec<T, kSize> low[kUnroll], high[kUnroll];
    const int64_t second = second_after<kNeox, kSize>(a);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {  // needs no position yet
      int64_t head = mine.group + u * groups;
      const bool is_query = head < query.heads;
      if (!is_query) head -= query.heads;
      at[u] = nullptr;
      if (!is_query && head >= key.heads) continue;
      const RotaryHeads& t = is_query ? query : key;
      at[u] = static_cast<T*>(t.data) + mine.token * t.token_stride + head * t.head_stride +
              first_of<kNeox>(pair);
      low[u] = load<kSize>(at[u]);
      high[u] = load<kSize>(at[u] + second);
    }
    if (!position.valid(a)) return;
    float cos[kSize], sin[kSize];
    position.template angles<C>(a, pair, cos, sin);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at[u] == nullptr) continue;
      float x[kSize], y[kSize];
      widen(low[u], x);
      widen(high[u], y);
      turn<kNeox>(x, y, cos, sin);
      store(at[u], narrow<T>(x));
      store(at[u] + second, narrow<T>(y));
    }
    pair += static_cast<int64_t>(s.lanes.divisor) * kSize;
  } while (kSize == 1 && pair < a.half);  // vectors: a lane for each
}

template <class T>
bool vectors_fit(const Rotary& a, const RotaryHeads& query, const RotaryHeads& key) {
  uint64_t all = 0;
  for (const RotaryHeads& t : {query, key}) {
    if (t.heads == 0) continue;
    const int64_t strides = (t.token_stride | t.head_stride) * static_cast<int64_t>(sizeof(T));
    all |= reinterpret_cast<uintptr_t>(t.data) | static_cast<uint64_t>(strides);
  }
  return all % kVectorBytes == 0 && aligned_angles(a, sizeof(T)) && a.half / kFull<T> <= kBlockUnit;
}

template <class Position>
void launch_rotate_heads(const char* op, const Rotary& a, const RotaryHeads& query,
                         const RotaryHeads& key, const typename Position::Rule& rule,
                         Stream stream) {
  for_rotary_types(a, [&](auto tag, auto angle, auto neox) {
    using T = typename decltype(tag)::Type;
    using C = typename decltype(angle)::Type;
    constexpr bool kNeox = decltype(neox)::value;
    const bool vectors = vectors_fit<T>(a, query, key);
    const int64_t columns = vectors ? a.half / kFull<T> : a.half;
    const int64_t lanes = columns < kBlockUnit ? columns : kBlockUnit;
    const int64_t heads = query.heads + key.heads;
    const auto run = [&](auto kernel, int unroll) {
      const int64_t groups = ceil_div(heads, unroll);
      const SharedLaunch to = share_groups(a.tokens, groups, lanes);
      launch({op, stream, to.blocks, kRotaryThreads}, kernel, a, query, key, rule,
             static_cast<int>(groups), to.by);
    };
    if (!vectors) {
      run(rotate_kernel<T, C, Position, 1, kNeox, 1>, 1);
    } else if (a.tokens * heads * lanes >= resident_threads()) {  // two have their loads in flight
      run(rotate_kernel<T, C, Position, kFull<T>, kNeox, 2>, 2);
    } else {
      run(rotate_kernel<T, C, Position, kFull<T>, kNeox, 1>, 1);
    }
  });
}

}  // namespace
}  // namespace opmux::gpu

#endif

#if OPMUX_LAUNCHER

namespace opmux::gpu {

struct RotatedHeads {
  Rotary rotary;  // all but the positions
  RotaryHeads query, key;
};

// (T, heads * head_dim) or (T, heads, head_dim)
inline RotaryHeads heads_of(const char* op, const Tensor& t, int64_t tokens, int64_t head_dim) {
  check(t.dim() == 2 || t.dim() == 3, op, "query and key must have 2 or 3 dimensions");
  check(t.size(0) == tokens, op, "there must be one position per token");
  check_last_dim_contiguous(op, t);
  if (t.dim() == 3) {
    check(t.size(2) == head_dim, op, "last dimension must be head_dim");
    return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.size(1)};
  }
  check(t.size(1) % head_dim == 0, op, "row must be a multiple of head_dim");
  return {t.mutable_data_ptr(), t.stride(0), head_dim, t.size(1) / head_dim};
}

inline RotatedHeads rotated_heads(const char* op, int64_t tokens, const Tensor& query,
                                  const std::optional<Tensor>& key, int64_t head_dim,
                                  const Tensor& cos_sin_cache, bool is_neox) {
  RotatedHeads r = {rotary_of(op, query, tokens, head_dim, cos_sin_cache, is_neox), {}, {}};
  r.query = heads_of(op, query, tokens, head_dim);
  if (key) {
    check_same_device(op, query, *key);
    check_same_dtype(op, query, *key);
    r.key = heads_of(op, *key, tokens, head_dim);
  }
  check_row(op, (r.query.heads + r.key.heads) * head_dim);
  return r;
}

inline bool is_empty(const RotatedHeads& r) {
  return r.rotary.tokens == 0 || r.rotary.half == 0 || r.query.heads + r.key.heads == 0;
}

}  // namespace opmux::gpu

#endif
