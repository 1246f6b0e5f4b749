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

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kLineBytes = 64;

OPMUX_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

// A place in a row that is read, and what to ask for meanwhile.
template <class T>
struct Ahead {
  const T* now;
  const T* later;
  OPMUX_INLINE Ahead operator+(int64_t i) const { return {now + i, later + i}; }
};
// The hardware's look-ahead stops at the end of a page. Of 0.5 to 16 KiB ahead, a page was best:
// silu_and_mul from memory, bfloat16, a Zen 5 core: 24 -> 31 GB/s.
template <class T>
OPMUX_INLINE Ahead<T> page_ahead(const T* p) {
  return {p, p + kPageBytes / static_cast<int64_t>(sizeof(T))};
}
template <class T, class Count>
OPMUX_INLINE Pair load_pair(Ahead<T> p, Count count) {
  prefetch(p.later);
  if (kPair * sizeof(T) > kLineBytes) prefetch(p.later + kLineBytes / sizeof(T));
  return load_pair(p.now, count);
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
    // A streaming store waits for its page's translation; asking for one line fetches that early:
    // 31 -> 35 GB/s in the case above.
    if (reinterpret_cast<uintptr_t>(out + i) % kPageBytes == 0) prefetch(page_ahead(out + i).later);
    store_pair<true>(out + i, apply(f, load_pair(in + i, Full{})...));
  }
  for_pairs(i, n, step);
}

}  // namespace
}  // namespace opmux::cpu
#endif
