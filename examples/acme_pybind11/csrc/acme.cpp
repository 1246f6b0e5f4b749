// SPDX-License-Identifier: Apache-2.0
#include "acme.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace acme {
namespace {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    const bool nan = (word & 0x7fffffff) > 0x7f800000;  // rounding could carry it to infinity
    const uint32_t to_nearest_even = 0x7fff + (word >> 16 & 1);
    bits = static_cast<uint16_t>(nan ? word >> 16 | 0x40 : (word + to_nearest_even) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

template <class F>
void for_type(Type type, const F& f) {
  if (type == Type::kFloat32) {
    f(float{});
  } else {
    f(BFloat16{});
  }
}

// Double: the order of a float32 sum over 8192 values would show in the result.
float inverse_rms(double sum_of_squares, int64_t h, double eps) {
  return static_cast<float>(1 / std::sqrt(sum_of_squares / static_cast<double>(h) + eps));
}

}  // namespace

void silu_and_mul(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t rows,
                  int64_t d, Type type) {
  for_type(type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = 0; r < rows; ++r) {
      const T* in = static_cast<const T*>(x) + r * x_stride;
      T* result = static_cast<T*>(out) + r * out_stride;
      for (int64_t i = 0; i < d; ++i) {
        const float gate = static_cast<float>(in[i]);
        result[i] = T(gate / (1 + std::exp(-gate)) * static_cast<float>(in[d + i]));
      }
    }
  });
}

void rmsnorm(const void* x, int64_t x_stride, const void* weight, void* out, int64_t out_stride,
             int64_t rows, int64_t h, double eps, Type type) {
  for_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T* w = static_cast<const T*>(weight);
    for (int64_t r = 0; r < rows; ++r) {
      const T* in = static_cast<const T*>(x) + r * x_stride;
      T* result = static_cast<T*>(out) + r * out_stride;
      double sum = 0;
      for (int64_t i = 0; i < h; ++i) sum += std::pow(static_cast<double>(float(in[i])), 2);
      const float scale = inverse_rms(sum, h, eps);
      for (int64_t i = 0; i < h; ++i) result[i] = T(float(in[i]) * scale * float(w[i]));
    }
  });
}

void fused_add_rmsnorm(void* x, void* residual, const void* weight, int64_t rows, int64_t h,
                       double eps, Type type) {
  for_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T* w = static_cast<const T*>(weight);
    std::vector<float> total(static_cast<size_t>(h));
    for (int64_t r = 0; r < rows; ++r) {
      T* in = static_cast<T*>(x) + r * h;
      T* carried = static_cast<T*>(residual) + r * h;
      double sum = 0;
      for (int64_t i = 0; i < h; ++i) {
        total[i] = float(in[i]) + float(carried[i]);
        carried[i] = T(total[i]);
        sum += std::pow(static_cast<double>(total[i]), 2);
      }
      const float scale = inverse_rms(sum, h, eps);
      for (int64_t i = 0; i < h; ++i) in[i] = T(total[i] * scale * float(w[i]));
    }
  });
}

}  // namespace acme
