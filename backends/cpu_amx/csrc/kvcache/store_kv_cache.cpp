// SPDX-License-Identifier: Apache-2.0
// store_kv_cache(k_cache, v_cache, slot_mapping, k, v), in place: k_cache[slot_mapping[t]] = k[t],
// v likewise; a negative slot is skipped.
#include "elementwise.h"
#include "indices.h"

#if OPMUX_LAUNCHER
#include <limits>
#endif

namespace opmux::cpu {
namespace {

// Everything in bytes.
struct TokenRows {
  const char* source;
  int64_t source_stride;
  char* cache;
  int64_t cache_stride;
  int64_t bytes;  // of a row
  Indices slots;
  bool stream;  // the rows do not fit the caches
};
using StoreKernel = void(const TokenRows&, int64_t token_begin, int64_t token_end);

#if OPMUX_KERNEL

constexpr int64_t kRawBytes = sizeof(Raw);

// Slots may be anywhere, so nothing but this loop knows where the next rows lie: it asks for the
// source's next row, and of the cache's for the translation of its page.
void store_rows(const TokenRows& a, int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t next = token + 1 < token_end ? token + 1 : token;
    if (a.slots[next] >= 0) prefetch(a.cache + a.slots[next] * a.cache_stride);
    if (a.slots[token] < 0) continue;
    const char* from = a.source + token * a.source_stride;
    const char* later = a.source + next * a.source_stride;
    char* to = a.cache + a.slots[token] * a.cache_stride;
    const bool stream = a.stream && until_aligned(to) == 0;
    int64_t i = 0;
    for (; i + kRawBytes <= a.bytes; i += kRawBytes) {
      prefetch(later + i);
      const Raw raw = load_raw<Raw>(from + i);
      stream ? store_raw<true>(to + i, raw) : store_raw<false>(to + i, raw);
    }
    __builtin_memcpy(to + i, from + i, static_cast<size_t>(a.bytes - i));
  }
  if (a.stream) stream_fence();
}

#endif

OPMUX_ONE_KERNEL(store_kernels, StoreKernel, store_rows);

#if OPMUX_LAUNCHER

constexpr const char* kOp = "store_kv_cache";

// A token is one row in the cache, and one or more pieces in the source, such as heads that lie
// apart in a slice of a wider projection.
class Store {
 public:
  Store(const Tensor& cache, const Tensor& source)
      : pieces_(kOp, {reads(source)}, 1), cache_(static_cast<char*>(cache.mutable_data_ptr())) {
    check_same_device(kOp, cache, source);
    check_same_dtype(kOp, cache, source);
    check(cache.dim() == source.dim(), kOp, "cache and source must have one number of dimensions");
    int64_t dense = 1;
    for (int64_t i = cache.dim() - 1; i > 0; --i) {
      check(cache.size(i) == source.size(i), kOp, "cache and source must have one shape per token");
      check(cache.size(i) <= 1 || cache.stride(i) == dense, kOp, "a cache row must be contiguous");
      dense *= cache.size(i);
    }
    item_ = static_cast<int64_t>(source.element_size());
    check(item_ == 1 || item_ == 2 || item_ == 4, kOp, "an element must have 1, 2 or 4 bytes");
    source_stride_ = source.stride(0) * item_;
    cache_stride_ = cache.stride(0) * item_;
    pieces_.join_dense_rows();
  }

  int64_t token_bytes() const { return pieces_.size() * pieces_.width(0) * item_; }

  void store(const Indices& slots, bool stream, int64_t token_begin, int64_t token_end) const {
    const int64_t bytes = pieces_.width(0) * item_;
    char* to = cache_;
    pieces_.for_spans(0, pieces_.size(), [&](const RowSpan<1>& span) {
      const char* from = static_cast<const char*>(span.data[0]);
      for (int64_t i = 0; i < span.rows; ++i, to += bytes) {
        const char* piece = from + i * span.stride[0] * item_;
        store_kernels.get()({piece, source_stride_, to, cache_stride_, bytes, slots, stream},
                            token_begin, token_end);
      }
    });
  }

 private:
  Rows<1> pieces_;  // of the first token
  char* cache_;
  int64_t item_, source_stride_, cache_stride_;
};

void store_kv_cache(Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping, const Tensor& k,
                    const Tensor& v) {
  const Store store_k(k_cache, k), store_v(v_cache, v);
  check_same_device(kOp, k_cache, v_cache, slot_mapping);
  const int64_t tokens = slot_mapping.numel();
  check(k.size(0) == tokens && v.size(0) == tokens, kOp, "there must be one slot per token");
  const Indices slots = indices_of(kOp, slot_mapping, tokens);
  const int64_t limit = k_cache.size(0);
  check(v_cache.size(0) == limit, kOp, "both caches must have one number of slots");
  check_range(kOp, slots, tokens, std::numeric_limits<int64_t>::min(), limit, "slot out of range");

  const int64_t token_bytes = 2 * (store_k.token_bytes() + store_v.token_bytes());
  const bool stream = streams(tokens * token_bytes);
  parallel(tokens, token_bytes, [&](int64_t begin, int64_t end) {
    store_k.store(slots, stream, begin, end);
    store_v.store(slots, stream, begin, end);
  });
}
OPMUX_OP(store_kv_cache, store_kv_cache);

#endif

}  // namespace
}  // namespace opmux::cpu
