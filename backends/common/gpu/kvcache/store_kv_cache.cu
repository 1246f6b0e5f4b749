// SPDX-License-Identifier: Apache-2.0
// store_kv_cache(k_cache, v_cache, slot_mapping, k, v), in place: k_cache[slot_mapping[t]] = k[t],
// v likewise; a slot outside of the cache is skipped. It copies bytes.
#include "gpu.h"
#include "indices.h"

namespace opmux::gpu {

// Tokens of one tensor and their slots, in bytes. A token is one dense row in the cache and one or
// more pieces in the source, such as heads that lie apart in a slice of a wider projection.
struct Store {
  Plane<1> pieces;  // of the first token
  char* cache;
  int64_t width;  // of a piece; 0: there is nothing to store
  int64_t source_stride, cache_stride;
};

struct Stores {
  Store k, v;
  Indices slots;
  int64_t tokens;
  int64_t limit;  // slots
  int item;       // bytes an element
};
void launch_store_kv_cache(const Stores& a, Stream stream);

}  // namespace opmux::gpu

#if OPMUX_KERNEL

#include "rows.cuh"
#include "vec.cuh"

namespace opmux::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;

struct Source {
  RowsOf<1> pieces;
  Divider width;  // vectors a piece
  char* cache;
  int64_t source_stride, cache_stride;
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

template <int kBytes>
__global__ void __launch_bounds__(kThreads) store_kernel(StoreArgs a) {
  wait_for_previous();
  let_next_start();
  const uint32_t first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  Vec<uint8_t, kBytes> value[kUnroll];
  char* to[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t item = first + u * kThreads;
    const Split at = a.vectors.split(item < a.items ? item : a.items - 1);
    const int64_t token = a.first_token + at.quotient;
    const int64_t slot = a.slots.at(token);
    const bool is_k = at.remainder < a.k_vectors;
    const Source& s = is_k ? a.k : a.v;
    const uint32_t vector = is_k ? at.remainder : at.remainder - a.k_vectors;
    const Split piece = s.width.split(vector);
    const uint8_t* from = s.pieces.template row<const uint8_t>(0, piece.quotient) +
                          token * s.source_stride + static_cast<int64_t>(piece.remainder) * kBytes;
    value[u] = load_streaming<kBytes>(from);
    const bool kept = item < a.items && slot >= 0 && slot < a.limit;
    to[u] =
        kept ? s.cache + slot * s.cache_stride + static_cast<int64_t>(vector) * kBytes : nullptr;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (to[u] != nullptr) store(reinterpret_cast<uint8_t*>(to[u]), value[u]);
  }
}

bool aligned(const Store& s, int bytes) {
  if (s.width == 0) return true;
  const uint64_t all = reinterpret_cast<uintptr_t>(s.cache) |
                       static_cast<uint64_t>(s.width | s.source_stride | s.cache_stride);
  return all % static_cast<uint64_t>(bytes) == 0 && aligned_rows(s.pieces, 1, bytes);
}

Source source_of(const Store& s, int bytes) {
  if (s.width == 0) return {RowsOf<1>(s.pieces), Divider(1), nullptr, 0, 0};
  return {RowsOf<1>(s.pieces), Divider(s.width / bytes), s.cache, s.source_stride, s.cache_stride};
}

template <int kBytes>
void store_tokens(const Stores& a, Stream stream) {
  const int64_t k = a.k.pieces.rows * a.k.width / kBytes, v = a.v.pieces.rows * a.v.width / kBytes;
  StoreArgs args = {source_of(a.k, kBytes),
                    source_of(a.v, kBytes),
                    static_cast<uint32_t>(k),
                    Divider(k + v),
                    a.slots,
                    a.limit,
                    0,
                    0};
  const int64_t step = ((int64_t{1} << 31) - 1) / (k + v);  // the kernel counts in 31 bits
  for (int64_t token = 0; token < a.tokens; token += step) {
    const int64_t tokens = a.tokens - token < step ? a.tokens - token : step;
    args.first_token = token;
    args.items = static_cast<uint32_t>(tokens * (k + v));
    launch({"store_kv_cache", stream, ceil_div(args.items, kThreads * kUnroll), kThreads},
           store_kernel<kBytes>, args);
  }
}

}  // namespace

void launch_store_kv_cache(const Stores& a, Stream stream) {
  if (aligned(a.k, kVectorBytes) && aligned(a.v, kVectorBytes)) {
    return store_tokens<kVectorBytes>(a, stream);
  }
  if (a.item == 4) return store_tokens<4>(a, stream);
  if (a.item == 2) return store_tokens<2>(a, stream);
  store_tokens<1>(a, stream);
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
std::vector<Store> stores_of(const Tensor& cache, const Tensor& source) {
  check_same_device(kOp, cache, source);
  check_same_dtype(kOp, cache, source);
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
  check_row(kOp, 2 * dense * item);
  std::vector<Store> stores;
  if (dense == 0) return stores;
  pieces.join_dense_rows();
  char* to = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t width = pieces.width(0) * item;
  pieces.for_planes([&](Plane<1> plane) {
    plane.inner_stride[0] *= item;
    plane.outer_stride[0] *= item;
    stores.push_back({plane, to, width, source.stride(0) * item, cache.stride(0) * item});
    to += plane.rows * width;
  });
  return stores;
}

void store_kv_cache(Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping, const Tensor& k,
                    const Tensor& v) {
  const std::vector<Store> of_k = stores_of(k_cache, k), of_v = stores_of(v_cache, v);
  check_same_device(kOp, k_cache, v_cache, slot_mapping);
  const int64_t tokens = slot_mapping.numel();
  check(k.size(0) == tokens && v.size(0) == tokens, kOp, "there must be one slot per token");
  const Indices slots = indices_of(kOp, slot_mapping, tokens);
  const int64_t limit = k_cache.size(0);
  check(v_cache.size(0) == limit, kOp, "both caches must have one number of slots");
  if (tokens == 0) return;
  const Place place(kOp, k_cache);
  const int item = static_cast<int>(k.element_size());
  for (size_t i = 0; i < std::max(of_k.size(), of_v.size()); ++i) {
    const Store none = {};
    launch_store_kv_cache({i < of_k.size() ? of_k[i] : none, i < of_v.size() ? of_v[i] : none,
                           slots, tokens, limit, item},
                          place.stream());
  }
}
OPMUX_OP(store_kv_cache, store_kv_cache);

}  // namespace
}  // namespace opmux::gpu

#endif
