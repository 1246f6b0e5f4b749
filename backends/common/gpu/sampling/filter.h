// SPDX-License-Identifier: Apache-2.0
// What the sampling ops' two parts share: probabilities and filters, as launchers pass them.
#pragma once

#include "gpu.h"

namespace opmux::gpu {

struct Probs {
  const void* data;
  int64_t stride;  // elements between rows
  int64_t rows;
  int64_t size;  // of a row
  FloatType type;
};

// One value for all rows, or one each.
struct RowInts {
  const void* per_row;  // int32 or int64; null: `all`
  bool wide;
  int64_t all;
};
struct RowFloats {
  const float* per_row;  // null: `all`
  double all;
};

// Which tokens stay: both filters, or those that are there.
struct Filter {
  bool has_k, has_p;
  RowInts k;
  RowFloats p;
  bool joint;  // p counts from the whole mass, not from what k leaves
};

struct FilterLaunch {
  const char* op;
  Probs probs;
  Filter filter;
  const float* uniform;  // a token is drawn; null: the row is renormalised
  int32_t* tokens;
  float* out;
  int64_t out_stride;
};
// Defined beside top_k_top_p_sample, used by both renormalisations too.
void launch_filter(const FilterLaunch& a, Stream stream);

#if OPMUX_LAUNCHER

inline Probs probs_of(const char* op, const Tensor& probs) {
  check(probs.dim() == 2, op, "probs must have two dimensions");
  check_last_dim_contiguous(op, probs);
  check_row(op, probs.size(1));
  check_row(op, probs.size(0));
  return {probs.const_data_ptr(), probs.stride(0), probs.size(0), probs.size(1),
          float_type(op, probs)};
}

inline void check_per_row(const char* op, const Tensor& probs, const Tensor& values) {
  check_same_device(op, probs, values);
  check(values.dim() == 1 && values.size(0) == probs.size(0), op, "needs one value per row");
  check_last_dim_contiguous(op, values);
}

inline const float* floats_of(const char* op, const Tensor& probs, const Tensor& values) {
  check_per_row(op, probs, values);
  check_float32(op, values);
  return static_cast<const float*>(values.const_data_ptr());
}

inline RowFloats floats_of(const char* op, const Tensor& probs,
                           const std::optional<Tensor>& per_row, double all) {
  return {per_row.has_value() ? floats_of(op, probs, *per_row) : nullptr, all};
}

inline RowInts ints_of(const char* op, const Tensor& probs, const std::optional<Tensor>& per_row,
                       int64_t all) {
  if (!per_row.has_value()) return {nullptr, false, all};
  check_per_row(op, probs, *per_row);
  const bool wide = index_type(op, *per_row) == IndexType::kInt64;
  return {per_row->const_data_ptr(), wide, all};
}

// Checks `out` of a renormalisation and fills in where it goes.
inline void renormalise_to(FilterLaunch* a, const Tensor& probs, const Tensor& out) {
  check_same_device(a->op, probs, out);
  check_same_shape(a->op, probs, out);
  check_last_dim_contiguous(a->op, out);
  check_float32(a->op, out);
  a->out = static_cast<float*>(out.mutable_data_ptr());
  a->out_stride = out.stride(0);
}

inline int32_t* tokens_of(const char* op, const Tensor& probs, const Tensor& out) {
  check_same_device(op, probs, out);
  check(out.dim() == 1 && out.size(0) == probs.size(0), op, "out must have one token per row");
  check_last_dim_contiguous(op, out);
  check(dtype_of(out) == aoti_torch_dtype_int32(), op, "out must be int32");
  return static_cast<int32_t*>(out.mutable_data_ptr());
}

#endif

}  // namespace opmux::gpu
