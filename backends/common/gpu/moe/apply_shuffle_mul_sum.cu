// SPDX-License-Identifier: Apache-2.0
// apply_shuffle_mul_sum(x, permutation, factors) -> out:
// out[t] = sum over j of factors[t, j] * x[permutation[t, j]], without rows out of range
#include "moe/row_sum.h"

namespace opmux::gpu {

void launch_apply_shuffle_mul_sum(const RowSum& rows, Stream stream);

#if OPMUX_KERNEL
void launch_apply_shuffle_mul_sum(const RowSum& rows, Stream stream) {
  launch_row_sum<true>("apply_shuffle_mul_sum", rows, stream);
}
#endif

#if OPMUX_LAUNCHER
void apply_shuffle_mul_sum(const Tensor& x, const Tensor& permutation,
                           const std::optional<Tensor>& factors, Tensor out) {
  constexpr const char* kOp = "apply_shuffle_mul_sum";
  check_same_device(kOp, x, permutation, out);
  check_same_dtype(kOp, x, out);
  const FloatType type = float_type(kOp, x);
  const bool wide = index_type(kOp, permutation) == IndexType::kInt64;
  check(x.dim() == 2 && permutation.dim() == 2 && out.dim() == 2, kOp,
        "tensors must have two dimensions");
  check(out.size(0) == permutation.size(0) && out.size(1) == x.size(1), kOp,
        "out must be (tokens, h)");
  check_last_dim_contiguous(kOp, x);
  check_last_dim_contiguous(kOp, permutation);
  check_last_dim_contiguous(kOp, out);
  check_row(kOp, x.size(1));
  check_row(kOp, permutation.size(1));
  RowSum rows = {x.const_data_ptr(),
                 out.mutable_data_ptr(),
                 0,
                 x.size(0) > 1 ? x.stride(0) : 0,
                 out.size(0) > 1 ? out.stride(0) : 0,
                 out.size(0),
                 x.size(1),
                 static_cast<int>(permutation.size(1)),
                 1.0f,
                 type,
                 {permutation.const_data_ptr(), wide},
                 nullptr,
                 permutation.stride(0),
                 0,
                 x.size(0)};
  if (factors.has_value()) {
    check_same_device(kOp, x, *factors);
    check_float32(kOp, *factors);
    check_same_shape(kOp, permutation, *factors);
    check_last_dim_contiguous(kOp, *factors);
    rows.factors = static_cast<const float*>(factors->const_data_ptr());
    rows.factors_stride = factors->stride(0);
  }
  if (rows.tokens * rows.width == 0) return;
  const Place place(kOp, x);
  launch_apply_shuffle_mul_sum(rows, place.stream());
}
OPMUX_OP(apply_shuffle_mul_sum, apply_shuffle_mul_sum);
#endif

}  // namespace opmux::gpu
