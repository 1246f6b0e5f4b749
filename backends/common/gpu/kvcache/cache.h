// SPDX-License-Identifier: Apache-2.0
// What the ops that write the KV cache share: what a cache holds, and its scales.
#pragma once

#include "gpu.h"

namespace opmux::gpu {

// What becomes of a row on its way into the cache.
enum class CacheType : int { kCopied, kE4M3, kE5M2 };

struct CacheScale {
  const float* data;  // one element on the device, or null
  float known;        // its inverse, where it is not on the device

#if OPMUX_KERNEL
  __device__ float inverse() const { return data != nullptr ? 1.0f / *data : known; }
#endif
};

#if OPMUX_LAUNCHER

inline CacheType cache_type(const char* op, const Tensor& cache, const Tensor& source) {
  if (dtype_of(cache) == dtype_of(source)) return CacheType::kCopied;
  float_type(op, source);
  if (dtype_of(cache) == aoti_torch_dtype_float8_e4m3fn()) return CacheType::kE4M3;
  check(dtype_of(cache) == aoti_torch_dtype_float8_e5m2(), op,
        "a cache must have its source's dtype or be float8");
  return CacheType::kE5M2;
}

inline CacheScale cache_scale(const char* op, CacheType type, const Tensor& cache,
                              const std::optional<Tensor>& scale, double value) {
  if (type == CacheType::kCopied) {
    check(!scale && value == 1.0, op, "only what is quantised has a scale");
    return {nullptr, 1.0f};
  }
  if (!scale) {
    check(value > 0.0, op, "a scale must be positive");
    return {nullptr, 1.0f / static_cast<float>(value)};
  }
  check_same_device(op, cache, *scale);
  check_float32(op, *scale);
  check(scale->dim() == 1 && scale->size(0) == 1, op, "a scale must have shape (1,)");
  return {static_cast<const float*>(scale->const_data_ptr()), 1.0f};
}

#endif

}  // namespace opmux::gpu

#if OPMUX_KERNEL

#include "quantization/quantize.cuh"

namespace opmux::gpu {

struct Fp8E5M2 {
  static __device__ uint32_t one(float v) { return fp8_e5m2_bits(v); }

  // The low byte holds the first.
  static __device__ uint32_t four(float a, float b, float c, float d) {
    return fp8_e5m2_pair_bits(a, b) | fp8_e5m2_pair_bits(c, d) << 16;
  }
};

}  // namespace opmux::gpu

#endif
