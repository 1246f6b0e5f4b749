// SPDX-License-Identifier: Apache-2.0
// The loops over a row.
#pragma once

#include "kernel.h"

#if OPMUX_KERNEL
namespace opmux::cpu {
namespace {

// f(i, count) for the pieces of [begin, end) that a Pair holds; count is Full but for the last,
// where it is an int.
template <class F>
OPMUX_INLINE void for_pairs(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kPair <= end; i += kPair) f(i, Full{});
  if (i < end) f(i, static_cast<int>(end - i));
}

template <class F, class... Pairs>
OPMUX_INLINE Pair apply(const F& f, const Pairs&... in) {
  return {f(in.a...), f(in.b...)};
}

// out[i] = f(in[i]...) for i < n. stream: past the caches, see store_pair; the caller fences after
// its last row.
template <class T, class F, class... In>
OPMUX_INLINE void map_row(bool stream, int64_t n, T* out, const F& f, In... in) {
  const auto step = [&](int64_t i, auto count) {
    store_pair(out + i, apply(f, load_pair(in + i, count)...), count);
  };
  if (!stream) return for_pairs(0, n, step);
  int64_t i = until_aligned(out);
  if (i >= n) return for_pairs(0, n, step);
  for_pairs(0, i, step);
  for (; i + kPair <= n; i += kPair) {
    store_pair<true>(out + i, apply(f, load_pair(in + i, Full{})...));
  }
  for_pairs(i, n, step);
}

}  // namespace
}  // namespace opmux::cpu
#endif
