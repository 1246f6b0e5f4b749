// SPDX-License-Identifier: Apache-2.0
// The slots t * topk + j of a batch of tokens, each with the expert that it goes to.
#pragma once

#include "indices.h"

namespace opmux::gpu {

struct Slots {
  Indices ids;  // of (tokens, topk)
  int64_t stride;
  uint32_t topk;
  uint32_t count;
  uint32_t experts;
};

#if OPMUX_LAUNCHER

inline Slots slots_of(const char* op, const Tensor& topk_ids, int64_t num_experts) {
  const bool wide = index_type(op, topk_ids) == IndexType::kInt64;
  check(topk_ids.dim() == 2, op, "topk_ids must have two dimensions");
  check_last_dim_contiguous(op, topk_ids);
  const int64_t tokens = topk_ids.size(0), topk = topk_ids.size(1);
  check(topk == 0 || tokens < kMaxRow / topk, op, "there must be fewer than 2**31 slots");
  check(num_experts >= 1 && num_experts < kMaxRow, op, "num_experts is out of range");
  return {{topk_ids.const_data_ptr(), wide},
          topk_ids.stride(0),
          static_cast<uint32_t>(topk),
          static_cast<uint32_t>(tokens * topk),
          static_cast<uint32_t>(num_experts)};
}

inline int32_t* ints_of(const char* op, const Tensor& t, int64_t elements) {
  check(dtype_of(t) == aoti_torch_dtype_int32(), op, "outputs must be int32");
  check(t.dim() == 1 && t.size(0) == elements, op, "an output has a wrong size");
  check_last_dim_contiguous(op, t);
  return static_cast<int32_t*>(t.mutable_data_ptr());
}

#endif

}  // namespace opmux::gpu
