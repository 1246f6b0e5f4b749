// SPDX-License-Identifier: Apache-2.0
// store_kv_cache(k_cache, v_cache, slot_mapping, k, v, k_scale, v_scale), in place:
// k_cache[slot_mapping[t]] = k[t], v likewise; a slot outside of the cache is skipped. It copies
// bytes, or quantises floats to a float8 cache.
#include "gpu.h"
#include "indices.h"
#include "kvcache/cache.h"

namespace opmux::gpu {

// Tokens of one tensor and their slots, in bytes. A token is one dense row in the cache and one or
// more pieces in the source, such as heads that lie apart in a slice of a wider projection.
struct Store {
  Plane<1> pieces;  // of the first token
  char* cache;
  int64_t width;  // of a piece in the source; 0: there is nothing to store
  int64_t source_stride, cache_stride;
  CacheScale scale;
};

struct Stores {
  Store k, v;
  Indices slots;
  int64_t tokens;
  int64_t limit;  // slots
  int item;       // bytes of a source element
  CacheType cache_type;
  FloatType source_type;  // where it is not copied
};
void launch_store_kv_cache(const Stores& a, Stream stream);

}  // namespace opmux::gpu

#if OPMUX_KERNEL

#include "rows.cuh"
#include "vec.cuh"

namespace opmux::gpu {
namespace {

constexpr int kThreads = 256;

// What a thread moves, and how many bytes that is on both sides.
template <int kBytes>
struct Copied {
  static constexpr int kFrom = kBytes, kTo = kBytes;
  Vec<uint8_t, kBytes> value;

  __device__ void read(const uint8_t* from) { value = load<kBytes>(from); }
  __device__ void write(uint8_t* to, const CacheScale&) const { store(to, value); }
};
template <class T, class Q, int kSize>
struct Quantized {
  static constexpr int kFrom = kSize * static_cast<int>(sizeof(T)), kTo = kSize;
  Vec<T, kSize> value;

  __device__ void read(const uint8_t* from) {
    value = load<kSize>(reinterpret_cast<const T*>(from));
  }
  __device__ void write(uint8_t* to, const CacheScale& scale) const {
    float wide[kSize];
    widen(value, wide);
    store_quantized<Q>(to, wide, scale.inverse());
  }
};

struct Source {
  RowsOf<1> pieces;
  Divider width;  // vectors a piece
  char* cache;
  int64_t source_stride, cache_stride;
  CacheScale scale;
};

struct StoreArgs {
  Source k, v;
  uint32_t k_vectors;  // a token
  Divider vectors;     // a token, k and v together
  Indices slots;
  int64_t limit;
  int64_t first_token;
  uint32_t items;  // vectors in all
};

template <class Move, int kUnroll>
__global__ void __launch_bounds__(kThreads) store_kernel(StoreArgs a) {
  wait_for_previous();
  let_next_start();
  const uint32_t first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  Move moved[kUnroll];
  uint8_t* to[kUnroll];
  bool of_k[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t item = first + u * kThreads;
    const Split at = a.vectors.split(item < a.items ? item : a.items - 1);
    const int64_t token = a.first_token + at.quotient;
    const int64_t slot = a.slots.at(token);
    of_k[u] = at.remainder < a.k_vectors;
    const Source& s = of_k[u] ? a.k : a.v;
    const uint32_t vector = of_k[u] ? at.remainder : at.remainder - a.k_vectors;
    const Split piece = s.width.split(vector);
    const uint8_t* from = s.pieces.template row<const uint8_t>(0, piece.quotient) +
                          token * s.source_stride +
                          static_cast<int64_t>(piece.remainder) * Move::kFrom;
    moved[u].read(from);
    const bool kept = item < a.items && slot >= 0 && slot < a.limit;
    const int64_t place = slot * s.cache_stride + static_cast<int64_t>(vector) * Move::kTo;
    to[u] = kept ? reinterpret_cast<uint8_t*>(s.cache + place) : nullptr;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (to[u] != nullptr) moved[u].write(to[u], (of_k[u] ? a.k : a.v).scale);
  }
}

bool aligned(const Store& s, int from_bytes, int to_bytes) {
  if (s.width == 0) return true;
  const uint64_t from = static_cast<uint64_t>(s.width | s.source_stride);
  const uint64_t to = reinterpret_cast<uintptr_t>(s.cache) | static_cast<uint64_t>(s.cache_stride);
  return from % static_cast<uint64_t>(from_bytes) == 0 &&
         to % static_cast<uint64_t>(to_bytes) == 0 && aligned_rows(s.pieces, 1, from_bytes);
}

Source source_of(const Store& s, int bytes) {
  if (s.width == 0) return {RowsOf<1>(s.pieces), Divider(1), nullptr, 0, 0, s.scale};
  return {RowsOf<1>(s.pieces), Divider(s.width / bytes), s.cache,
          s.source_stride,     s.cache_stride,           s.scale};
}

template <class Move>
void store_tokens(const Stores& a, Stream stream) {
  const int64_t k = a.k.pieces.rows * a.k.width / Move::kFrom;
  const int64_t v = a.v.pieces.rows * a.v.width / Move::kFrom;
  StoreArgs args = {source_of(a.k, Move::kFrom),
                    source_of(a.v, Move::kFrom),
                    static_cast<uint32_t>(k),
                    Divider(k + v),
                    a.slots,
                    a.limit,
                    0,
                    0};
  const auto run = [&](auto kernel, int unroll) {
    launch({"store_kv_cache", stream, ceil_div(args.items, kThreads * unroll), kThreads}, kernel,
           args);
  };
  const int64_t step = ((int64_t{1} << 31) - 1) / (k + v);  // the kernel counts in 31 bits
  for (int64_t token = 0; token < a.tokens; token += step) {
    const int64_t tokens = a.tokens - token < step ? a.tokens - token : step;
    args.first_token = token;
    args.items = static_cast<uint32_t>(tokens * (k + v));
    // Two vectors a thread hide more latency, once there are enough threads without that.
    if (args.items >= 2 * resident_threads()) {
      run(store_kernel<Move, 2>, 2);
    } else {
      run(store_kernel<Move, 1>, 1);
    }
  }
}

template <class T, class Q>
void quantize_tokens(const Stores& a, Stream stream) {
  using Full = Quantized<T, Q, kFull<T>>;
  if (aligned(a.k, Full::kFrom, Full::kTo) && aligned(a.v, Full::kFrom, Full::kTo)) {
    return store_tokens<Full>(a, stream);
  }
  store_tokens<Quantized<T, Q, 1>>(a, stream);
}

}  // namespace

void launch_store_kv_cache(const Stores& a, Stream stream) {
  if (a.cache_type != CacheType::kCopied) {
    return for_float_type(a.source_type, [&](auto tag) {
      using T = typename decltype(tag)::Type;
      a.cache_type == CacheType::kE4M3 ? quantize_tokens<T, Fp8>(a, stream)
                                       : quantize_tokens<T, Fp8E5M2>(a, stream);
    });
  }
  if (aligned(a.k, kVectorBytes, kVectorBytes) && aligned(a.v, kVectorBytes, kVectorBytes)) {
    return store_tokens<Copied<kVectorBytes>>(a, stream);
  }
  if (a.item == 4) return store_tokens<Copied<4>>(a, stream);
  if (a.item == 2) return store_tokens<Copied<2>>(a, stream);
  store_tokens<Copied<1>>(a, stream);
}

}  // namespace opmux::gpu

#endif

#if OPMUX_LAUNCHER

#include <algorithm>
#include <vector>

namespace opmux::gpu {
namespace {

constexpr const char* kOp = "store_kv_cache";

// Checks one cache and what goes into it; returns a Store for each plane of pieces, usually one.
std::vector<Store> stores_of(const Tensor& cache, const Tensor& source, const CacheScale& scale) {
  check_same_device(kOp, cache, source);
  check(cache.dim() == source.dim(), kOp, "cache and source must have one number of dimensions");
  Rows<1> pieces(kOp, {reads(source)}, 1);
  int64_t dense = 1;
  for (int64_t i = cache.dim() - 1; i > 0; --i) {
    check(cache.size(i) == source.size(i), kOp, "cache and source must have one shape per token");
    check(cache.size(i) <= 1 || cache.stride(i) == dense, kOp, "a cache row must be contiguous");
    dense *= cache.size(i);
  }
  const int64_t item = static_cast<int64_t>(source.element_size());
  check(item == 1 || item == 2 || item == 4, kOp, "an element must have 1, 2 or 4 bytes");
  const int64_t cache_item = static_cast<int64_t>(cache.element_size());
  check_row(kOp, 2 * dense * item);
  std::vector<Store> stores;
  if (dense == 0) return stores;
  pieces.join_dense_rows();
  char* to = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t width = pieces.width(0) * item;
  pieces.for_planes([&](Plane<1> plane) {
    plane.inner_stride[0] *= item;
    plane.outer_stride[0] *= item;
    stores.push_back(
        {plane, to, width, source.stride(0) * item, cache.stride(0) * cache_item, scale});
    to += plane.rows * pieces.width(0) * cache_item;
  });
  return stores;
}

void store_kv_cache(Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping, const Tensor& k,
                    const Tensor& v, const std::optional<Tensor>& k_scale_per_row, double k_scale,
                    const std::optional<Tensor>& v_scale_per_row, double v_scale) {
  check_same_device(kOp, k_cache, v_cache, slot_mapping);
  check_same_dtype(kOp, k_cache, v_cache);
  check_same_dtype(kOp, k, v);
  const CacheType type = cache_type(kOp, k_cache, k);
  const std::vector<Store> of_k =
      stores_of(k_cache, k, cache_scale(kOp, type, k_cache, k_scale_per_row, k_scale));
  const std::vector<Store> of_v =
      stores_of(v_cache, v, cache_scale(kOp, type, k_cache, v_scale_per_row, v_scale));
  const int64_t tokens = slot_mapping.numel();
  check(k.size(0) == tokens && v.size(0) == tokens, kOp, "there must be one slot per token");
  const Indices slots = indices_of(kOp, slot_mapping, tokens);
  const int64_t limit = k_cache.size(0);
  check(v_cache.size(0) == limit, kOp, "both caches must have one number of slots");
  if (tokens == 0) return;
  const Place place(kOp, k_cache);
  const int item = static_cast<int>(k.element_size());
  const FloatType source = type == CacheType::kCopied ? FloatType::kFloat32 : float_type(kOp, k);
  for (size_t i = 0; i < std::max(of_k.size(), of_v.size()); ++i) {
    const Store none = {};
    launch_store_kv_cache({i < of_k.size() ? of_k[i] : none, i < of_v.size() ? of_v[i] : none,
                           slots, tokens, limit, item, type, source},
                          place.stream());
  }
}
OPMUX_OP(store_kv_cache, store_kv_cache);

}  // namespace
}  // namespace opmux::gpu

#endif
