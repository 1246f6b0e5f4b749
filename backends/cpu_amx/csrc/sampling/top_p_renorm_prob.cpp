// SPDX-License-Identifier: Apache-2.0
// top_p_renorm_prob(probs, top_p) -> out: the likeliest of each row up to mass p, over their sum
#include "sampling/launch.h"
#include "sampling/nucleus.h"
#include "sampling/renorm.h"

namespace opmux::cpu {
namespace {

using TopPRenorm = void(const void* probs, int64_t size, double p, float* out, void* scratch);

#if OPMUX_KERNEL
template <class T>
void top_p_renorm_row(const void* probs, int64_t size, double p, float* out, void* scratch) {
  const T* from = static_cast<const T*>(probs);
  const Row row = read_row(from, size, scratch);
  renormalise(from, size, keep_top_p(row, p, row.all), out);
}
#endif

OPMUX_FLOAT_KERNELS(top_p_renorm_kernels, TopPRenorm, top_p_renorm_row);

#if OPMUX_LAUNCHER
void top_p_renorm_prob(const Tensor& probs, const std::optional<Tensor>& top_p_per_row,
                       double top_p, Tensor out) {
  constexpr const char* kOp = "top_p_renorm_prob";
  const Probs from = check_probs(kOp, probs);
  check_renormed(kOp, probs, out);
  const std::vector<double> p = per_row(kOp, probs, top_p_per_row, top_p);
  TopPRenorm* kernel = top_p_renorm_kernels.get(from.type);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t stride = out.stride(0);
  for_rows(from, workspace_bytes(from.size), [&](int64_t b, void* scratch) {
    kernel(from.row(b), from.size, p[static_cast<size_t>(b)], to + b * stride, scratch);
  });
}
OPMUX_OP(top_p_renorm_prob, top_p_renorm_prob);
#endif

}  // namespace
}  // namespace opmux::cpu
