// SPDX-License-Identifier: Apache-2.0
// What the fused query and key norms share: each head normed, weighted and rotated, written in
// place or, keys and values, to the KV cache.
#pragma once

#include "kvcache/cache.h"
#include "position/rotary.h"

namespace opmux::gpu {

struct QkNorm {
  Rotary rotary;
  void* qkv;  // the heads of the query, the keys, the values
  int64_t stride;
  int64_t head_dim;
  int64_t query_heads, key_heads;
  int64_t value_heads;  // 0: keys stay in place and values as they are
  const void* query_weight;
  const void* key_weight;
  float eps;
  float inverse_dim;  // 1 / head_dim
  Indices slots;
  int64_t slot_limit;
  void* key_cache;
  void* value_cache;
  int64_t key_cache_stride, value_cache_stride;  // elements of the cache
  CacheType cache_type;
  CacheScale key_scale, value_scale;
};
using LaunchQkNorm = void(const QkNorm& a, Stream stream);

}  // namespace opmux::gpu

#if OPMUX_KERNEL

#include "position/rotary.cuh"
#include "reduce.cuh"

namespace opmux::gpu {
namespace {

constexpr int kQkMost = 6;  // heads of a thread

// Heads of one kind, spread over groups of lanes.
struct HeadKind {
  int heads, groups;
};
struct HeadKinds {
  HeadKind query, key, value;
  int most;  // heads of a group

  HeadKinds(const QkNorm& a, int each)
      : query(spread(a.query_heads, each)),
        key(spread(a.key_heads, each)),
        value(spread(a.value_heads, each)),
        most(each) {}

  int groups() const { return query.groups + key.groups + value.groups; }

 private:
  static HeadKind spread(int64_t heads, int each) {
    return {static_cast<int>(heads), static_cast<int>(ceil_div(heads, each))};
  }
};

// The heads of a thread, all of one kind, and where they are. A group beyond the last one, or of a
// token that does not exist, has none.
template <class T>
struct QkHeads {
  int64_t token;
  OnePosition position;
  int count, first, step;
  bool is_query, is_value;
  T* from;  // head 0 of the kind

  __device__ QkHeads(const QkNorm& a, const HeadKinds& kinds, const Share& mine)
      : token(mine.exists ? mine.token : 0), position(a.rotary, {}, token) {
    first = mine.group;
    is_query = first < kinds.query.groups;
    is_value = first >= kinds.query.groups + kinds.key.groups;
    step = is_query ? kinds.query.groups : is_value ? kinds.value.groups : kinds.key.groups;
    count = is_query ? kinds.query.heads : is_value ? kinds.value.heads : kinds.key.heads;
    int64_t before = 0;
    if (!is_query) {
      first -= kinds.query.groups;
      before += a.query_heads;
    }
    if (is_value) {
      first -= kinds.key.groups;
      before += a.key_heads;
    }
    if (!mine.exists || first >= step) count = 0;
    from = static_cast<T*>(a.qkv) + token * a.stride + before * a.head_dim;
  }

  __device__ const T* weight(const QkNorm& a) const {
    return static_cast<const T*>(is_query ? a.query_weight : a.key_weight);
  }
};

// Where they go.
template <class T, bool kStores>
struct QkPlace {
  bool placed;  // the token is at a valid position; else it stays as it is
  bool writes;
  CacheType type = CacheType::kCopied;
  char* to;
  float inverse = 1.0f;  // of the cache's scale

  __device__ QkPlace(const QkNorm& a, const QkHeads<T>& h) {
    placed = h.position.valid(a.rotary);
    writes = placed;
    to = reinterpret_cast<char*>(h.from);
    if (!kStores || h.is_query) return;
    const int64_t slot = a.slots.at(h.token);
    writes = placed && slot >= 0 && slot < a.slot_limit;
    type = a.cache_type;
    const int64_t item = type == CacheType::kCopied ? sizeof(T) : 1;
    const int64_t row = slot * (h.is_value ? a.value_cache_stride : a.key_cache_stride);
    to = static_cast<char*>(h.is_value ? a.value_cache : a.key_cache) + row * item;
    if (type != CacheType::kCopied) {
      inverse = (h.is_value ? a.value_scale : a.key_scale).inverse();
    }
  }

  template <int kSize>
  __device__ void write(int64_t offset, const float (&value)[kSize]) const {
    if (!writes) return;
    if (!kStores || type == CacheType::kCopied) {
      store(reinterpret_cast<T*>(to) + offset, narrow<T>(value));
    } else if (type == CacheType::kE4M3) {
      store_quantized<Fp8>(reinterpret_cast<uint8_t*>(to) + offset, value, inverse);
    } else {
      store_quantized<Fp8E5M2>(reinterpret_cast<uint8_t*>(to) + offset, value, inverse);
    }
  }
  // Values, bit for bit where they are not quantised.
  template <int kSize>
  __device__ void copy(int64_t offset, const Vec<T, kSize>& raw) const {
    if (type == CacheType::kCopied) {
      if (writes) store(reinterpret_cast<T*>(to) + offset, raw);
      return;
    }
    float value[kSize];
    widen(raw, value);
    write(offset, value);
  }
};

// A lane holds two vectors of each of its heads: those of its pairs, or two behind rot_dim. All
// threads of a block stay together: lanes sum. Eight blocks on a processor, which 64 registers
// allow, and no unrolling: two heads unrolled took 5 us longer.
template <class T, class C, bool kStores, bool kNeox>
__global__ void __launch_bounds__(kRotaryThreads, 8)
    qk_norm_kernel(QkNorm a, HeadKinds kinds, Sharing s) {
  constexpr int kSize = kFull<T>;
  wait_for_previous();
  let_next_start();
  const Share mine(s, a.rotary.tokens);
  const QkHeads<T> heads(a, kinds, mine);
  const int pair = mine.lane * kSize;
  const bool rotates = pair < a.rotary.half;
  const int first = rotates ? static_cast<int>(first_of<kNeox>(pair)) : 2 * pair;
  const int second =
      rotates ? first + static_cast<int>(second_after<kNeox, kSize>(a.rotary)) : first + kSize;

  // The vectors arrive in shared memory, which holds more of them in flight than registers do.
  __shared__ Shared<VecWord<T, kSize>, 2 * kQkMost * kRotaryThreads> staged;
  const auto index = [&](int u, int half) {
    return (2 * u + half) * kRotaryThreads + static_cast<int>(threadIdx.x);
  };
  for (int u = 0; u < kinds.most; ++u) {
    const int head = heads.first + u * heads.step;
    if (head >= heads.count) break;
    const T* from = heads.from + head * a.head_dim;
    copy_async(staged, index(u, 0), reinterpret_cast<const VecWord<T, kSize>*>(from + first));
    copy_async(staged, index(u, 1), reinterpret_cast<const VecWord<T, kSize>*>(from + second));
  }
  const QkPlace<T, kStores> place(a, heads);
  // Weight and rotation in one: x * on[x] - y * across[x] and y * on[y] + x * across[y].
  float on[2 * kSize], across[2 * kSize];
  {
    float cos[kSize] = {}, sin[kSize] = {}, weight[2][kSize];
    load_floats(heads.weight(a) + first, weight[0]);
    load_floats(heads.weight(a) + second, weight[1]);
    if (rotates && place.placed) heads.position.template angles<C>(a.rotary, pair, cos, sin);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int x = kNeox ? i : 2 * i, y = kNeox ? kSize + i : 2 * i + 1;
      const float of_x = weight[x / kSize][x % kSize], of_y = weight[y / kSize][y % kSize];
      on[x] = rotates ? of_x * cos[i] : of_x;
      on[y] = rotates ? of_y * cos[i] : of_y;
      across[x] = of_y * sin[i];
      across[y] = of_x * sin[i];
    }
  }
  wait_for_copies();
#pragma unroll 1
  for (int u = 0; u < kinds.most; ++u) {
    const int head = heads.first + u * heads.step;
    const bool normed = head < heads.count && !heads.is_value;
    float x[kSize] = {}, y[kSize] = {}, v[2 * kSize], squares = 0;
    if (normed) {
      VecBits<T, kSize> low, high;
      low.word = staged[index(u, 0)];
      high.word = staged[index(u, 1)];
      widen(low.vec, x);
      widen(high.vec, y);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) squares = fmaf(x[i], x[i], fmaf(y[i], y[i], squares));
    for (int mask = static_cast<int>(s.lanes.divisor) / 2; mask > 0; mask /= 2) {
      squares += shuffle_xor(squares, mask);
    }
    if (!normed) continue;
    const int offset = head * static_cast<int>(a.head_dim);
    const float inverse = rsqrtf(squares * a.inverse_dim + a.eps);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      v[i] = x[i] * inverse;
      v[kSize + i] = y[i] * inverse;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int m = kNeox ? i : 2 * i, n = kNeox ? kSize + i : 2 * i + 1;
      const float p = v[m], q = v[n];
      v[m] = rotates ? fmaf(p, on[m], -(q * across[m])) : p * on[m];
      v[n] = rotates ? fmaf(q, on[n], p * across[n]) : q * on[n];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      x[i] = v[i];
      y[i] = v[kSize + i];
    }
    place.write(offset + first, x);
    place.write(offset + second, y);
  }
  if constexpr (kStores) {
    const int values = heads.is_value ? heads.count : 0;
    for (int head = heads.first, u = 0; head < values; head += heads.step, ++u) {
      const int offset = head * static_cast<int>(a.head_dim);
      VecBits<T, kSize> low, high;
      low.word = staged[index(u, 0)];
      high.word = staged[index(u, 1)];
      place.copy(offset + first, low.vec);
      place.copy(offset + second, high.vec);
    }
  }
}

constexpr int kAnyLanes = 32;

// Heads of any width, element by element.
template <class T, class C, bool kStores, bool kNeox>
__global__ void __launch_bounds__(kRotaryThreads)
    qk_norm_any_kernel(QkNorm a, HeadKinds kinds, Sharing s) {
  wait_for_previous();
  let_next_start();
  const Share mine(s, a.rotary.tokens);
  const QkHeads<T> h(a, kinds, mine);
  const QkPlace<T, kStores> place(a, h);
  const int lane = mine.lane;
  const int64_t offset = h.first * a.head_dim;
  const bool exists = h.first < h.count, normed = exists && !h.is_value;
  float squares = 0;
  for (int64_t i = lane; normed && i < a.head_dim; i += kAnyLanes) {
    const float x = to_float(h.from[offset + i]);
    squares += x * x;
  }
  squares = reduce_lanes<kAnyLanes>(squares, Add{});  // before any lane writes
  const float inverse = rsqrtf(squares * a.inverse_dim + a.eps);
  const auto norm = [&](int64_t i) {
    return to_float(h.from[offset + i]) * inverse * to_float(h.weight(a)[i]);
  };
  for (int64_t pair = lane; normed && place.placed && pair < a.rotary.half; pair += kAnyLanes) {
    const int64_t first = first_of<kNeox>(pair);
    const int64_t second = first + second_after<kNeox, 1>(a.rotary);
    float x[1] = {norm(first)}, y[1] = {norm(second)}, cos[1], sin[1];
    h.position.template angles<C>(a.rotary, pair, cos, sin);
    turn<true>(x, y, cos, sin);
    place.write(offset + first, x);
    place.write(offset + second, y);
  }
  for (int64_t i = (normed ? 2 * a.rotary.half : 0) + lane; exists && i < a.head_dim;
       i += kAnyLanes) {
    if (normed) {
      const float x[1] = {norm(i)};
      place.write(offset + i, x);
    } else {
      place.copy(offset + i, load<1>(h.from + offset + i));
    }
  }
}

template <class T>
bool vectors_fit(const QkNorm& a) {
  constexpr int64_t kItem = sizeof(T), kSize = kFull<T>;
  const auto aligned = [](const void* data, int64_t stride, int64_t bytes) {
    const uint64_t all = reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(stride);
    return all % static_cast<uint64_t>(bytes) == 0;
  };
  const int64_t lanes = a.head_dim / (2 * kSize);
  if (a.head_dim % (2 * kSize) != 0 || lanes > 32 || (lanes & (lanes - 1)) != 0) return false;
  const int64_t item = a.cache_type == CacheType::kCopied ? kItem : 1;
  return aligned_angles(a.rotary, kItem) && aligned(a.qkv, a.stride * kItem, kSize * kItem) &&
         aligned(a.query_weight, 0, kSize * kItem) && aligned(a.key_weight, 0, kSize * kItem) &&
         aligned(a.key_cache, a.key_cache_stride * item, kSize * item) &&
         aligned(a.value_cache, a.value_cache_stride * item, kSize * item);
}

// How many heads a thread has: as many as keep most threads of a block at work, where a head costs
// about as much as what a thread does once, while threads fill a third of the device. H200, 64/8
// heads of 128: 5 heads 79.7 us at 8192 tokens, 3 heads 88 to 91; at 512 tokens 10.0 and 7.4.
inline HeadKinds spread_heads(const QkNorm& a, int64_t lanes) {
  HeadKinds best(a, 1);
  const int64_t heads = a.query_heads + a.key_heads + a.value_heads;
  double most = 0;
  for (int each = 1; each <= kQkMost; ++each) {
    const HeadKinds kinds(a, each);
    if (3 * a.rotary.tokens * kinds.groups() * lanes < resident_threads()) break;
    const Sharing by = share_groups(1, kinds.groups(), lanes).by;
    const double work = static_cast<double>(heads * by.tokens) / (by.parts.divisor * (each + 1.0));
    if (work < most) continue;
    most = work;
    best = kinds;
  }
  return best;
}

template <bool kStores, class T, class C, bool kNeox>
void launch_qk_norm_heads(const char* op, const QkNorm& a, Stream stream) {
  const bool vectors = vectors_fit<T>(a);
  const int64_t lanes = vectors ? a.head_dim / (2 * kFull<T>) : kAnyLanes;
  const HeadKinds kinds = vectors ? spread_heads(a, lanes) : HeadKinds(a, 1);
  const SharedLaunch to = share_groups(a.rotary.tokens, kinds.groups(), lanes);
  const Launch at = {op, stream, to.blocks, kRotaryThreads};
  if (vectors) return launch(at, qk_norm_kernel<T, C, kStores, kNeox>, a, kinds, to.by);
  launch(at, qk_norm_any_kernel<T, C, kStores, kNeox>, a, kinds, to.by);
}

}  // namespace

template <bool kStores>
void launch_qk_norm(const char* op, const QkNorm& a, Stream stream) {
  for_rotary_types(a.rotary, [&](auto tag, auto angle, auto neox) {
    using T = typename decltype(tag)::Type;
    using C = typename decltype(angle)::Type;
    launch_qk_norm_heads<kStores, T, C, decltype(neox)::value>(op, a, stream);
  });
}

}  // namespace opmux::gpu

#endif

#if OPMUX_LAUNCHER

namespace opmux::gpu {

struct HeadCounts {
  int64_t query, key, value;
};

// All but the cache.
inline QkNorm qk_norm_of(const char* op, const Tensor& qkv, const HeadCounts& heads,
                         int64_t head_dim, double eps, const Tensor& query_weight,
                         const Tensor& key_weight, const Tensor& cos_sin_cache, bool is_neox,
                         const Tensor& positions) {
  check(qkv.dim() == 2, op, "qkv must have 2 dimensions");
  check(heads.query > 0 && heads.key > 0 && heads.value > 0, op,
        "numbers of heads must be positive");
  const int64_t all = heads.query + heads.key + heads.value;
  check(head_dim > 0 && qkv.size(1) % head_dim == 0 && qkv.size(1) / head_dim == all, op,
        "qkv must have the heads' width");
  check_row(op, qkv.size(1));
  check_same_device(op, qkv, query_weight, key_weight, positions);
  check_same_dtype(op, qkv, query_weight, key_weight);
  for (const Tensor& weight : {query_weight, key_weight}) {
    check(weight.dim() == 1 && weight.size(0) == head_dim, op,
          "a weight must have head_dim values");
  }
  QkNorm a = {};
  a.rotary = rotary_of(op, qkv, qkv.size(0), head_dim, cos_sin_cache, is_neox);
  a.rotary.positions = indices_of(op, positions, qkv.size(0));
  a.qkv = qkv.mutable_data_ptr();
  a.stride = qkv.stride(0);
  a.head_dim = head_dim;
  a.query_heads = heads.query;
  a.key_heads = heads.key;
  a.query_weight = query_weight.const_data_ptr();
  a.key_weight = key_weight.const_data_ptr();
  a.eps = static_cast<float>(eps);
  a.inverse_dim = 1.0f / static_cast<float>(head_dim);
  return a;
}

}  // namespace opmux::gpu

#endif
