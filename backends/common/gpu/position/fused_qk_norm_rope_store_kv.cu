// SPDX-License-Identifier: Apache-2.0
// fused_qk_norm_rope_store_kv(qkv, k_cache, v_cache, slot_mapping, num_heads_q, num_heads_k,
// num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, is_neox, positions, k_scale,
// v_scale): the query's heads normed and rotated in place, the keys' on their way into the cache,
// and the values after them.
#include "position/qk_norm.h"

namespace opmux::gpu {

LaunchQkNorm launch_fused_qk_norm_rope_store_kv;

#if OPMUX_KERNEL
void launch_fused_qk_norm_rope_store_kv(const QkNorm& a, Stream stream) {
  launch_qk_norm<true>("fused_qk_norm_rope_store_kv", a, stream);
}
#endif

#if OPMUX_LAUNCHER

namespace {

constexpr const char* kOp = "fused_qk_norm_rope_store_kv";

// (slots, heads * head_dim) or (slots, heads, head_dim)
void check_rows_of(const Tensor& cache, int64_t heads, int64_t head_dim) {
  const bool flat = cache.dim() == 2 && cache.size(1) == heads * head_dim;
  const bool whole = cache.dim() == 3 && cache.size(1) == heads && cache.size(2) == head_dim;
  check(flat || whole, kOp, "a cache must have rows of its heads");
  check_last_dim_contiguous(kOp, cache);
  check(flat || heads == 1 || cache.stride(1) == head_dim, kOp, "a cache row must be contiguous");
}

}  // namespace

void fused_qk_norm_rope_store_kv(Tensor qkv, Tensor k_cache, Tensor v_cache,
                                 const Tensor& slot_mapping, int64_t num_heads_q,
                                 int64_t num_heads_k, int64_t num_heads_v, int64_t head_dim,
                                 double eps, const Tensor& q_weight, const Tensor& k_weight,
                                 const Tensor& cos_sin_cache, bool is_neox, const Tensor& positions,
                                 const std::optional<Tensor>& k_scale_per_row, double k_scale,
                                 const std::optional<Tensor>& v_scale_per_row, double v_scale) {
  QkNorm a = qk_norm_of(kOp, qkv, {num_heads_q, num_heads_k, num_heads_v}, head_dim, eps, q_weight,
                        k_weight, cos_sin_cache, is_neox, positions);
  check_same_device(kOp, qkv, k_cache, v_cache, slot_mapping);
  check_same_dtype(kOp, k_cache, v_cache);
  check_rows_of(k_cache, num_heads_k, head_dim);
  check_rows_of(v_cache, num_heads_v, head_dim);
  a.slot_limit = k_cache.size(0);
  check(v_cache.size(0) == a.slot_limit, kOp, "both caches must have one number of slots");
  a.slots = indices_of(kOp, slot_mapping, a.rotary.tokens);
  a.value_heads = num_heads_v;
  a.key_cache = k_cache.mutable_data_ptr();
  a.value_cache = v_cache.mutable_data_ptr();
  a.key_cache_stride = k_cache.stride(0);
  a.value_cache_stride = v_cache.stride(0);
  a.cache_type = cache_type(kOp, k_cache, qkv);
  a.key_scale = cache_scale(kOp, a.cache_type, k_cache, k_scale_per_row, k_scale);
  a.value_scale = cache_scale(kOp, a.cache_type, k_cache, v_scale_per_row, v_scale);
  if (a.rotary.tokens == 0) return;
  const Place place(kOp, qkv);
  launch_fused_qk_norm_rope_store_kv(a, place.stream());
}
OPMUX_OP(fused_qk_norm_rope_store_kv, fused_qk_norm_rope_store_kv);

#endif

}  // namespace opmux::gpu
