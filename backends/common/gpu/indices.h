// SPDX-License-Identifier: Apache-2.0
// A vector of int32 or int64 indices on the device. The host cannot look at them without waiting,
// so kernels skip what an index outside of its range would touch.
#pragma once

#include "gpu.h"

namespace opmux::gpu {

struct Indices {
  const void* data;
  bool wide;  // int64, else int32

#if OPMUX_KERNEL
  __device__ int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
#endif
};

#if OPMUX_LAUNCHER

// `count` indices in a contiguous 1-D tensor.
inline Indices indices_of(const char* op, const Tensor& t, int64_t count) {
  const bool wide = index_type(op, t) == IndexType::kInt64;
  check(t.dim() == 1 && t.size(0) == count, op, "there must be one index per row");
  check_last_dim_contiguous(op, t);
  return {t.const_data_ptr(), wide};
}

#endif

}  // namespace opmux::gpu
