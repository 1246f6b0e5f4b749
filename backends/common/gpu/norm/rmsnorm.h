// SPDX-License-Identifier: Apache-2.0
// What the RMS norms share: x / sqrt(mean(x^2) + eps) * weight, of x or of x + residual.
#pragma once

#include "gpu.h"

namespace opmux::gpu {

// x and out; or, in place, x and the residual: residual = x + residual, x = norm(x + residual)
struct NormRows {
  Plane<2> rows;
  const void* weight;
  int64_t width;
  float eps;
  FloatType type;
};
using LaunchNorm = void(const NormRows&, Stream);

#if OPMUX_LAUNCHER

inline void launch_rows(const char* op, LaunchNorm* launch, const Operand (&operands)[2],
                        const Tensor& weight, double eps) {
  const Tensor& x = operands[0].tensor;
  const Tensor& other = operands[1].tensor;
  check_same_device(op, x, other, weight);
  check_same_dtype(op, x, other, weight);
  check_same_shape(op, x, other);
  const FloatType type = float_type(op, x);
  const Rows<2> rows(op, operands);
  const int64_t width = rows.width(0);
  check(weight.dim() == 1 && weight.size(0) == width, op,
        "weight must have one element per column");
  check_last_dim_contiguous(op, weight);
  check_row(op, width);
  if (rows.size() * width == 0) return;
  const Place place(op, x);
  rows.for_planes([&](const Plane<2>& plane) {
    launch({plane, weight.const_data_ptr(), width, static_cast<float>(eps), type}, place.stream());
  });
}

inline void norm(const char* op, LaunchNorm* launch, const Tensor& x, const Tensor& weight,
                 double eps, const Tensor& out) {
  launch_rows(op, launch, {reads(x), writes(out)}, weight, eps);
}

inline void add_norm(const char* op, LaunchNorm* launch, const Tensor& x, const Tensor& residual,
                     const Tensor& weight, double eps) {
  launch_rows(op, launch, {writes(x), writes(residual)}, weight, eps);
}

#endif

}  // namespace opmux::gpu
