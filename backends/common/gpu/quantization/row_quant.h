// SPDX-License-Identifier: Apache-2.0
// Quantisation of rows that a block reads whole: with a scale for each row, and behind a norm,
// which needs the whole row, with a scale for each row or group.
#pragma once

#include "quantization/quantize.h"

namespace opmux::gpu {

struct RowQuantRows {
  const void* x;
  int64_t x_stride;
  void* residual;  // nullptr: nothing is added
  int64_t residual_stride;
  const void* weight;  // nullptr: no norm
  float eps;
  QuantizedRows out;
  FloatType type;
};
using LaunchRowQuant = void(const RowQuantRows&, Stream);

#if OPMUX_LAUNCHER

inline void check_norm_quant(const char* op, const Tensor& x, const Tensor& weight) {
  check_same_dtype(op, x, weight);
  check(x.dim() == 2, op, "x must have two dimensions");
  check(weight.dim() == 1 && weight.size(0) == x.size(1), op,
        "weight must have one element per column");
}

// Quantises rows of x after their norm, and after a residual was added.
inline void norm_quant(const char* op, LaunchRowQuant* launch, const Tensor& x,
                       const Tensor* residual, const Tensor& weight, double eps,
                       const QuantizedRows& out) {
  const FloatType type = float_type(op, x);
  if (residual != nullptr) {
    check_same_dtype(op, x, *residual);
    check_same_shape(op, x, *residual);
  }
  if (x.size(0) == 0) return;
  const Place place(op, x);
  launch({x.const_data_ptr(), row_stride(x),
          residual == nullptr ? nullptr : residual->mutable_data_ptr(),
          residual == nullptr ? 0 : row_stride(*residual), weight.const_data_ptr(),
          static_cast<float>(eps), out, type},
         place.stream());
}

#endif

}  // namespace opmux::gpu
