// SPDX-License-Identifier: Apache-2.0
// store_kv_cache(k_cache, v_cache, slot_mapping, k, v, k_scale, v_scale), in place:
// k_cache[slot_mapping[t]] = k[t], v likewise; a negative slot is skipped. Copies bytes, or
// quantises floats to a float8 cache.
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
  int64_t bytes;  // of a row in the cache
  Indices slots;
  bool stream;    // the rows do not fit the caches
  float inverse;  // of the scale, where the rows are quantised
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

// The float8 types by their numbers of mantissa bits and the bits of floats: the least normal
// value, the largest value, the number whose last place is the least subnormal value.
struct E4M3 {
  static constexpr int kMantissa = 3, kMinNormal = 0x3c800000, kTop = 0x43e00000, kTopCode = 0x7e;
  static constexpr float kStep = 0x1p14f;
};
struct E5M2 {
  static constexpr int kMantissa = 2, kMinNormal = 0x38800000, kTop = 0x47600000, kTopCode = 0x7b;
  static constexpr float kStep = 0x1p7f;
};

// Saturates; rounds half to even; NaN stays NaN.
template <class Q>
OPMUX_INLINE VecI float8_bits(Vec v) {
  constexpr int kShift = 23 - Q::kMantissa, kHalf = (1 << (kShift - 1)) - 1;
  constexpr int kBias = (Q::kMinNormal >> kShift) - (1 << Q::kMantissa);
  const VecI bits = bits_of(v), magnitude = bits & 0x7fffffff;
  const VecI normal = ((magnitude + kHalf + ((magnitude >> kShift) & 1)) >> kShift) - kBias;
  const VecI small = bits_of(from_bits(magnitude) + splat(Q::kStep)) - bits_of(splat(Q::kStep));
  const VecI value = magnitude > 0x7f800000      ? splat(0x7f)
                     : magnitude >= Q::kTop      ? splat(Q::kTopCode)
                     : magnitude < Q::kMinNormal ? small
                                                 : normal;
  return value | ((bits >> 24) & 0x80);
}

template <class T, class Q>
void quantize_rows(const TokenRows& a, int64_t token_begin, int64_t token_end) {
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  for (int64_t token = token_begin; token < token_end; ++token) {
    if (a.slots[token] < 0) continue;
    const T* from = reinterpret_cast<const T*>(a.source + token * a.source_stride);
    char* to = a.cache + a.slots[token] * a.cache_stride;
    const auto step = [&](int64_t i, Vec v, size_t count) {
      const Bytes bytes = __builtin_convertvector(float8_bits<Q>(v * a.inverse), Bytes);
      __builtin_memcpy(to + i, &bytes, count);
    };
    int64_t i = 0;
    for (; i + kLanes <= a.bytes; i += kLanes) step(i, load(from + i), kLanes);
    const int rest = static_cast<int>(a.bytes - i);
    if (rest > 0) step(i, load(from + i, rest), static_cast<size_t>(rest));
  }
}
template <class T>
void quantize_e4m3(const TokenRows& a, int64_t token_begin, int64_t token_end) {
  quantize_rows<T, E4M3>(a, token_begin, token_end);
}
template <class T>
void quantize_e5m2(const TokenRows& a, int64_t token_begin, int64_t token_end) {
  quantize_rows<T, E5M2>(a, token_begin, token_end);
}

#endif

OPMUX_ONE_KERNEL(store_kernels, StoreKernel, store_rows);
OPMUX_FLOAT_KERNELS(store_e4m3_kernels, StoreKernel, quantize_e4m3);
OPMUX_FLOAT_KERNELS(store_e5m2_kernels, StoreKernel, quantize_e5m2);

#if OPMUX_LAUNCHER

constexpr const char* kOp = "store_kv_cache";

StoreKernel* kernel_for(const Tensor& cache, const Tensor& source) {
  if (dtype_of(cache) == dtype_of(source)) return store_kernels.get();
  if (dtype_of(cache) == aoti_torch_dtype_float8_e4m3fn()) {
    return store_e4m3_kernels.get(float_type(kOp, source));
  }
  check(dtype_of(cache) == aoti_torch_dtype_float8_e5m2(), kOp,
        "a cache must have its source's dtype or be float8");
  return store_e5m2_kernels.get(float_type(kOp, source));
}

float inverse_of(const Tensor& cache, const Tensor& source, const std::optional<Tensor>& scale,
                 double value) {
  if (dtype_of(cache) == dtype_of(source)) {
    check(!scale && value == 1.0, kOp, "only what is quantised has a scale");
    return 1.0f;
  }
  if (!scale) {
    check(value > 0.0, kOp, "a scale must be positive");
    return 1.0f / static_cast<float>(value);
  }
  check_same_device(kOp, cache, *scale);
  check_float32(kOp, *scale);
  check(scale->dim() == 1 && scale->size(0) == 1, kOp, "a scale must have shape (1,)");
  return 1.0f / *static_cast<const float*>(scale->const_data_ptr());
}

// A token is one row in the cache, and one or more pieces in the source, such as heads that lie
// apart in a slice of a wider projection.
class Store {
 public:
  Store(const Tensor& cache, const Tensor& source, const std::optional<Tensor>& scale, double value)
      : pieces_(kOp, {reads(source)}, 1), kernel_(kernel_for(cache, source)) {
    check_same_device(kOp, cache, source);
    check(cache.dim() == source.dim(), kOp, "cache and source must have one number of dimensions");
    int64_t dense = 1;
    for (int64_t i = cache.dim() - 1; i > 0; --i) {
      check(cache.size(i) == source.size(i), kOp, "cache and source must have one shape per token");
      check(cache.size(i) <= 1 || cache.stride(i) == dense, kOp, "a cache row must be contiguous");
      dense *= cache.size(i);
    }
    item_ = static_cast<int64_t>(source.element_size());
    cache_item_ = static_cast<int64_t>(cache.element_size());
    check(item_ == 1 || item_ == 2 || item_ == 4, kOp, "an element must have 1, 2 or 4 bytes");
    rows_ = {};
    rows_.source_stride = source.stride(0) * item_;
    rows_.cache = static_cast<char*>(cache.mutable_data_ptr());
    rows_.cache_stride = cache.stride(0) * cache_item_;
    rows_.inverse = inverse_of(cache, source, scale, value);
    pieces_.join_dense_rows();
    rows_.bytes = pieces_.width(0) * cache_item_;
  }

  // Read and written.
  int64_t token_bytes() const { return pieces_.size() * pieces_.width(0) * (item_ + cache_item_); }

  void store(const Indices& slots, bool stream, int64_t token_begin, int64_t token_end) const {
    TokenRows rows = rows_;
    rows.slots = slots;
    rows.stream = stream;
    pieces_.for_spans(0, pieces_.size(), [&](const RowSpan<1>& span) {
      const char* from = static_cast<const char*>(span.data[0]);
      for (int64_t i = 0; i < span.rows; ++i, rows.cache += rows.bytes) {
        rows.source = from + i * span.stride[0] * item_;
        kernel_(rows, token_begin, token_end);
      }
    });
  }

 private:
  Rows<1> pieces_;  // of the first token
  StoreKernel* kernel_;
  TokenRows rows_;
  int64_t item_, cache_item_;
};

void store_kv_cache(Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping, const Tensor& k,
                    const Tensor& v, const std::optional<Tensor>& k_scale_per_row, double k_scale,
                    const std::optional<Tensor>& v_scale_per_row, double v_scale) {
  const Store store_k(k_cache, k, k_scale_per_row, k_scale);
  const Store store_v(v_cache, v, v_scale_per_row, v_scale);
  check_same_device(kOp, k_cache, v_cache, slot_mapping);
  check_same_dtype(kOp, k_cache, v_cache);
  check_same_dtype(kOp, k, v);
  const int64_t tokens = slot_mapping.numel();
  check(k.size(0) == tokens && v.size(0) == tokens, kOp, "there must be one slot per token");
  const Indices slots = indices_of(kOp, slot_mapping, tokens);
  const int64_t limit = k_cache.size(0);
  check(v_cache.size(0) == limit, kOp, "both caches must have one number of slots");
  check_range(kOp, slots, tokens, std::numeric_limits<int64_t>::min(), limit, "slot out of range");

  const int64_t token_bytes = store_k.token_bytes() + store_v.token_bytes();
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
