// SPDX-License-Identifier: Apache-2.0
// top_k_renorm_prob(probs, top_k) -> out: the k largest of each row, ties included, over their sum
#include "sampling/launch.h"
#include "sampling/renorm.h"

namespace opmux::cpu {
namespace {

using TopKRenorm = void(const void* probs, int64_t size, int64_t k, float* out, void* scratch);

#if OPMUX_KERNEL
template <class T>
void top_k_renorm_row(const void* probs, int64_t size, int64_t k, float* out, void* scratch) {
  const T* from = static_cast<const T*>(probs);
  renormalise(from, size, keep_top_k(read_row(from, size, scratch), k), out);
}
#endif

OPMUX_FLOAT_KERNELS(top_k_renorm_kernels, TopKRenorm, top_k_renorm_row);

#if OPMUX_LAUNCHER
void top_k_renorm_prob(const Tensor& probs, const std::optional<Tensor>& top_k_per_row,
                       int64_t top_k, Tensor out) {
  constexpr const char* kOp = "top_k_renorm_prob";
  const Probs from = check_probs(kOp, probs);
  check_renormed(kOp, probs, out);
  const std::vector<int64_t> k = per_row(kOp, probs, top_k_per_row, top_k);
  TopKRenorm* kernel = top_k_renorm_kernels.get(from.type);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t stride = out.stride(0);
  for_rows(from, workspace_bytes(from.size), [&](int64_t b, void* scratch) {
    kernel(from.row(b), from.size, k[static_cast<size_t>(b)], to + b * stride, scratch);
  });
}
OPMUX_OP(top_k_renorm_prob, top_k_renorm_prob);
#endif

}  // namespace
}  // namespace opmux::cpu
