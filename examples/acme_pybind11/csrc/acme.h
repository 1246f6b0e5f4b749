// SPDX-License-Identifier: Apache-2.0
// The vendor's kernels: raw pointers and sizes. Strides count elements; sums are kept in float32
// or wider and rounded once.
#pragma once

#include <cstdint>

namespace acme {

enum class Type : int { kFloat32, kBFloat16 };

// out[r, i] = silu(x[r, i]) * x[r, d + i]
void silu_and_mul(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t rows,
                  int64_t d, Type type);

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight
void rmsnorm(const void* x, int64_t x_stride, const void* weight, void* out, int64_t out_stride,
             int64_t rows, int64_t h, double eps, Type type);

// residual += x, x = rmsnorm(residual); both dense (rows, h), both written
void fused_add_rmsnorm(void* x, void* residual, const void* weight, int64_t rows, int64_t h,
                       double eps, Type type);

}  // namespace acme
