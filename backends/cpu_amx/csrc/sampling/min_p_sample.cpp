// SPDX-License-Identifier: Apache-2.0
// min_p_sample(probs, min_p, uniform) -> out: a token per row with probs >= min_p * max(probs)
#include "sampling/draw.h"
#include "sampling/launch.h"

namespace opmux::cpu {
namespace {

using MinPSample = int32_t(const void* probs, int64_t size, double p, double uniform);

#if OPMUX_KERNEL
template <class T>
int32_t min_p_token(const void* probs, int64_t size, double p, double uniform) {
  const T* from = static_cast<const T*>(probs);
  Vec largest[4] = {};  // several chains: a maximum takes longer than a load
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int c = 0; c < 4; ++c) largest[c] = max(load(from + i + c * kLanes), largest[c]);
  }
  for (; i < size; i += kLanes) {
    const int left = static_cast<int>(size - i);
    largest[0] = max(left >= kLanes ? load(from + i) : load(from + i, left), largest[0]);
  }
  const float most = reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  return draw(from, size, static_cast<float>(p) * most, uniform);
}
#endif

OPMUX_FLOAT_KERNELS(min_p_kernels, MinPSample, min_p_token);

#if OPMUX_LAUNCHER
void min_p_sample(const Tensor& probs, const std::optional<Tensor>& min_p_per_row, double min_p,
                  const Tensor& uniform, Tensor out) {
  constexpr const char* kOp = "min_p_sample";
  const Probs from = check_probs(kOp, probs);
  check_tokens(kOp, probs, out);
  const std::vector<double> p = per_row(kOp, probs, min_p_per_row, min_p);
  const std::vector<double> u = per_row(kOp, probs, uniform);
  MinPSample* kernel = min_p_kernels.get(from.type);
  int32_t* to = static_cast<int32_t*>(out.mutable_data_ptr());
  for_rows(from, 0, [&](int64_t b, void*) {
    const size_t i = static_cast<size_t>(b);
    to[b] = kernel(from.row(b), from.size, p[i], u[i]);
  });
}
OPMUX_OP(min_p_sample, min_p_sample);
#endif

}  // namespace
}  // namespace opmux::cpu
