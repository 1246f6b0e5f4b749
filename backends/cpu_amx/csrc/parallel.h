// SPDX-License-Identifier: Apache-2.0
// Work on torch's own threads, so that torch.set_num_threads holds. Everything is checked before:
// an exception must not leave a parallel region.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "opmux/rows.h"

namespace opmux::cpu {

// A thread gets at least this many bytes to move: waking one costs 2 to 5 us, the time in which a
// core moves about as much from its cache.
constexpr int64_t kBytesPerTask = 128 * 1024;

// Results beyond this go past the caches: they would evict the inputs and be evicted themselves
// before anyone reads them.
constexpr int64_t kStreamBytes = 16 * 1024 * 1024;
inline bool streams(int64_t result_bytes) { return result_bytes >= kStreamBytes; }

// f(begin, end) over pieces of [0, items).
template <class F>
void parallel(int64_t items, int64_t bytes_per_item, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_item));
  if (items <= grain) {
    if (items > 0) f(int64_t{0}, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, f);
}

// f(RowSpan) over all rows.
template <size_t N, class F>
void parallel_rows(const Rows<N>& rows, int64_t bytes_per_row, const F& f) {
  parallel(rows.size(), bytes_per_row,
           [&](int64_t begin, int64_t end) { rows.for_spans(begin, end, f); });
}

}  // namespace opmux::cpu
