// SPDX-License-Identifier: Apache-2.0
// min_p_sample(probs, min_p, uniform) -> out: a token per row with probs >= min_p * max(probs)
#include "sampling/filter.cuh"

namespace opmux::gpu {

struct MinP {
  Probs probs;
  RowFloats p;
  const float* uniform;
  int32_t* tokens;
};
void launch_min_p_sample(const MinP& a, Stream stream);

#if OPMUX_KERNEL

template <class T, int kSize>
__global__ void __launch_bounds__(kRowThreads, 2) min_p_kernel(MinP a) {
  OPMUX_ROW_WORK(w);
  wait_for_previous();
  let_next_start();
  Ranks ranks;
  const uint32_t index = blockIdx.x / static_cast<uint32_t>(ranks.size);
  const Row<T, kSize> row(a.probs, index, ranks);
  const float p = a.p.per_row != nullptr ? a.p.per_row[index] : static_cast<float>(a.p.all);
  uint32_t key = 0;
  row.for_each([&](float v, uint32_t) { key = key_of(v) > key ? key_of(v) : key; },
               [](uint32_t) {});
  key = reduce_words(w, key, 0, Max{});
  if (threadIdx.x == 0) w.given_words[0] = key;
  group_sync();
  key = reduce_lanes<kWarp>(ranks.read(w.given_words, 0), Max{});
  const float threshold = p * bits_as_float(key);
  const auto keep = [&](float v) { return v >= threshold; };
  sum_segments(row, w, 0,
               [&](float v, uint32_t) { return keep(v) ? static_cast<double>(v) : 0.0; });
  group_sync();
  const double uniform = static_cast<double>(a.uniform[index]);
  draw(row, ranks, w, segment_mass(row, w, 0), keep, uniform, a.tokens + index);
  group_sync();  // a block's shared memory is read by the others until here
}

void launch_min_p_sample(const MinP& a, Stream stream) {
  for_rows(a.probs, nullptr, 0, [&](auto tag, auto size) {
    using T = typename decltype(tag)::Type;
    const int group = blocks_per_row(a.probs);
    launch({"min_p_sample", stream, a.probs.rows * group, kRowThreads, group},
           min_p_kernel<T, decltype(size)::value>, a);
  });
}

#endif

#if OPMUX_LAUNCHER
void min_p_sample(const Tensor& probs, const std::optional<Tensor>& min_p_per_row, double min_p,
                  const Tensor& uniform, Tensor out) {
  constexpr const char* kOp = "min_p_sample";
  const MinP a = {probs_of(kOp, probs), floats_of(kOp, probs, min_p_per_row, min_p),
                  floats_of(kOp, probs, uniform), tokens_of(kOp, probs, out)};
  if (a.probs.rows == 0) return;
  const Place place(kOp, probs);
  launch_min_p_sample(a, place.stream());
}
OPMUX_OP(min_p_sample, min_p_sample);
#endif

}  // namespace opmux::gpu
