// SPDX-License-Identifier: Apache-2.0
// A vector of int32 or int64 indices, on both sides.
#pragma once

#include "kernel.h"

namespace opmux::cpu {
namespace {

struct Indices {
  const void* data;
  bool wide;  // int64, else int32
  inline int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

#if OPMUX_LAUNCHER

// `count` indices in a contiguous 1-D tensor.
inline Indices indices_of(const char* op, const Tensor& t, int64_t count) {
  const bool wide = index_type(op, t) == IndexType::kInt64;
  check(t.dim() == 1 && t.size(0) == count, op, "there must be one index per row");
  check_last_dim_contiguous(op, t);
  return {t.const_data_ptr(), wide};
}

// Read in full before the first write, so that a refused call has changed nothing.
inline void check_range(const char* op, const Indices& indices, int64_t count, int64_t low,
                        int64_t limit, const char* rule) {
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= indices[i] >= low && indices[i] < limit;
  check(inside, op, rule);
}

#endif

}  // namespace
}  // namespace opmux::cpu
