// SPDX-License-Identifier: Apache-2.0
// Dtype dispatch without the ScalarType conversion, which costs a chain of calls per tensor and
// throws for dtypes newer than the target torch.
#pragma once

#include "opmux/check.h"
#include "opmux/float_type.h"

namespace opmux {

inline FloatType float_type(const char* op, const Tensor& t) {
  const int32_t dtype = dtype_of(t);
  if (dtype == aoti_torch_dtype_bfloat16()) return FloatType::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return FloatType::kFloat16;
  check(dtype == aoti_torch_dtype_float32(), op, "dtype must be float32, bfloat16 or float16");
  return FloatType::kFloat32;
}

enum class IndexType : int { kInt32, kInt64 };

inline IndexType index_type(const char* op, const Tensor& t) {
  const int32_t dtype = dtype_of(t);
  if (dtype == aoti_torch_dtype_int64()) return IndexType::kInt64;
  check(dtype == aoti_torch_dtype_int32(), op, "indices must be int32 or int64");
  return IndexType::kInt32;
}

inline void check_float32(const char* op, const Tensor& t) {
  check(dtype_of(t) == aoti_torch_dtype_float32(), op, "dtype must be float32");
}

}  // namespace opmux
