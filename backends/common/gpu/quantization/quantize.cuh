// SPDX-License-Identifier: Apache-2.0
// From a maximum to a scale, from values to bytes, and scales to their places.
#pragma once

#include "quantization/quantize.h"

#if OPMUX_KERNEL

#include "quantization/fp8.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace opmux::gpu {

constexpr int kQuantLanes = 32;  // that share a group of any size; every warp has as many

// Unlike Max it passes over a NaN in the second argument.
struct Largest {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <int kSize>
__device__ inline float largest(float found, const float (&value)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) found = fmaxf(found, fabsf(value[i]));
  return found;
}

struct Scale {
  float value;
  float inverse;
};

// a / b rounded once, given 1 / b to a few units in the last place, where neither overflows nor is
// subnormal: the compiler's division tests for that and calls a subroutine, whose registers cost
// resident blocks.
__device__ inline float quotient(float a, float b, float reciprocal) {
  reciprocal = fmaf(reciprocal, fmaf(-b, reciprocal, 1.0f), reciprocal);
  const float near = a * reciprocal;
  return fmaf(reciprocal, fmaf(-b, near, a), near);
}

template <class Q>
__device__ inline Scale scale_of(float amax, bool power_of_two) {
  const float known = fminf(fmaxf(amax, 1e-10f), 3.40282347e38f);
  const float value = quotient(known, Q::kTop, 1.0f / Q::kTop);
  if (power_of_two) {
    const uint32_t bits = (float_as_bits(value) + 0x7fffffu) & ~0x7fffffu;
    return {bits_as_float(bits), bits_as_float((254u << 23) - bits)};
  }
  // Scaled, as the reciprocal of the largest float is subnormal.
  constexpr float kSmaller = 0x1p-64f;
  const float factor = known > 1.0f ? kSmaller : 1.0f;
  const float scaled = known * factor;
  return {value, quotient(Q::kTop, scaled, divide_fast(1.0f, scaled)) * factor};
}

template <class Q, int kSize>
__device__ inline void store_quantized(uint8_t* to, const float (&value)[kSize], float inverse) {
  union {
    Vec<uint8_t, kSize> vec;
    uint32_t word[kSize < 4 ? 1 : kSize / 4];
  } bits;
  if constexpr (kSize % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      bits.word[i / 4] = Q::four(value[i] * inverse, value[i + 1] * inverse, value[i + 2] * inverse,
                                 value[i + 3] * inverse);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      bits.vec.item[i] = static_cast<uint8_t>(Q::one(value[i] * inverse));
    }
  }
  store<kSize>(to, bits.vec);
}

// The four groups of a packed word come from different threads: each writes its byte.
__device__ inline void write_scale(const ScalesOf& to, int64_t token, int64_t group, float scale) {
  if (to.layout == kRowScales) {
    static_cast<float*>(to.data)[token * to.stride + group] = scale;
  } else if (to.layout == kColumnScales) {
    static_cast<float*>(to.data)[group * to.stride + token] = scale;
  } else {
    static_cast<uint8_t*>(to.data)[4 * (group / 4 * to.stride + token) + group % 4] =
        static_cast<uint8_t>(float_as_bits(scale) >> 23);
  }
}

// Writes the padding behind a token's groups and, for the last token, behind the tokens.
__device__ inline void write_padding(const ScalesOf& to, int64_t token, int thread, int threads) {
  if (to.layout == kRowScales) return;
  const int64_t groups = to.layout == kPackedScales ? (to.groups + 3) / 4 * 4 : to.groups;
  for (int64_t g = to.groups + thread; g < groups; g += threads) write_scale(to, token, g, 0.0f);
  if (token != to.tokens - 1) return;
  for (int64_t p = 0; p < to.padding; ++p) {
    for (int64_t g = thread; g < groups; g += threads) write_scale(to, to.tokens + p, g, 0.0f);
  }
}

template <class T>
bool aligned_to(const T* data, int64_t stride, int item_bytes, int bytes) {
  const uint64_t all =
      reinterpret_cast<uintptr_t>(data) | static_cast<uint64_t>(stride * item_bytes);
  return all % static_cast<uint64_t>(bytes) == 0;
}

// Calls f(tag), whose Type is Fp8 or Int8.
template <class F>
void for_quantized_type(bool int8, const F& f) {
  if (int8) return f(TypeTag<Int8>{});
  f(TypeTag<Fp8>{});
}

}  // namespace opmux::gpu

#endif
