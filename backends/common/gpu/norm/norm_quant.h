// SPDX-License-Identifier: Apache-2.0
// Norms that quantise their result, with a scale for each row or group.
#pragma once

#include "quantization/quantize.h"

namespace opmux::gpu {

struct NormQuantRows {
  const void* x;
  int64_t x_stride;
  void* residual;  // nullptr: nothing is added
  int64_t residual_stride;
  const void* weight;
  float eps;
  QuantizedRows out;
  FloatType type;
};
using LaunchNormQuant = void(const NormQuantRows&, Stream);

#if OPMUX_LAUNCHER

inline void check_norm_quant(const char* op, const Tensor& x, const Tensor& weight) {
  check_same_dtype(op, x, weight);
  check(x.dim() == 2, op, "x must have two dimensions");
  check(weight.dim() == 1 && weight.size(0) == x.size(1), op,
        "weight must have one element per column");
}

inline void norm_quant(const char* op, LaunchNormQuant* launch, const Tensor& x,
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
