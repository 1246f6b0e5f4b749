// SPDX-License-Identifier: Apache-2.0
// Work on torch's own threads, so that torch.set_num_threads holds. Everything is checked before:
// an exception must not leave a parallel region.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "host.h"
#include "opmux/rows.h"

namespace opmux::cpu {

// A thread gets at least this many bytes to move: waking one costs 2 to 5 us, the time in which a
// core moves about as much from its cache.
constexpr int64_t kBytesPerTask = 128 * 1024;

// Whether an op that touches so many bytes is to write past the caches: what fills them evicts the
// inputs, and is evicted itself before anyone reads it.
inline bool streams(int64_t bytes) {
  const int64_t caches = torch::stable::get_num_threads() / host().cache_threads;
  return bytes >= std::max<int64_t>(1, caches) * host().cache_bytes;
}

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
