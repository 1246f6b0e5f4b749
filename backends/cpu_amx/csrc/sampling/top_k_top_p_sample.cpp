// SPDX-License-Identifier: Apache-2.0
// top_k_top_p_sample(probs, top_k, top_p, uniform, joint) -> out: a token per row
#include "sampling/draw.h"
#include "sampling/launch.h"
#include "sampling/nucleus.h"

namespace opmux::cpu {
namespace {

using TopKTopPSample = int32_t(const void* probs, int64_t size, int64_t k, double p, bool joint,
                               double uniform, void* scratch);

#if OPMUX_KERNEL
template <class T>
int32_t top_k_top_p_token(const void* probs, int64_t size, int64_t k, double p, bool joint,
                          double uniform, void* scratch) {
  const T* from = static_cast<const T*>(probs);
  const Row row = read_row(from, size, scratch);
  const Cut top_k = keep_top_k(row, k);
  const Cut top_p = keep_top_p(row, p, joint ? row.all : top_k);
  const uint32_t key = top_k.key > top_p.key ? top_k.key : top_p.key;
  return draw(from, size, as_float(key), uniform);
}
#endif

OPMUX_FLOAT_KERNELS(top_k_top_p_kernels, TopKTopPSample, top_k_top_p_token);

#if OPMUX_LAUNCHER
void top_k_top_p_sample(const Tensor& probs, const std::optional<Tensor>& top_k_per_row,
                        int64_t top_k, const std::optional<Tensor>& top_p_per_row, double top_p,
                        const Tensor& uniform, bool joint, Tensor out) {
  constexpr const char* kOp = "top_k_top_p_sample";
  const Probs from = check_probs(kOp, probs);
  check_tokens(kOp, probs, out);
  const std::vector<int64_t> k = per_row(kOp, probs, top_k_per_row, top_k);
  const std::vector<double> p = per_row(kOp, probs, top_p_per_row, top_p);
  const std::vector<double> u = per_row(kOp, probs, uniform);
  TopKTopPSample* kernel = top_k_top_p_kernels.get(from.type);
  int32_t* to = static_cast<int32_t*>(out.mutable_data_ptr());
  for_rows(from, workspace_bytes(from.size), [&](int64_t b, void* scratch) {
    const size_t i = static_cast<size_t>(b);
    to[b] = kernel(from.row(b), from.size, k[i], p[i], joint, u[i], scratch);
  });
}
OPMUX_OP(top_k_top_p_sample, top_k_top_p_sample);
#endif

}  // namespace
}  // namespace opmux::cpu
