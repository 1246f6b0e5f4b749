// SPDX-License-Identifier: Apache-2.0
// Top-k and top-p filters of a row, by a group of blocks:
//   1. One pass for the row's mass and the largest value of every few elements. The k-th largest of
//      those bounds the k-th largest of all from below; for p their mass does.
//   2. What lies above the bound is collected and sorted, usually a few dozen tokens.
//   3. Where there is no such bound, or too much above it: a radix search over all keys.
// The row comes from memory once, later passes find it in the L2 cache.
#pragma once

#include "sampling/candidates.cuh"
#include "sampling/filter.h"
#include "sampling/histogram.cuh"

#if OPMUX_KERNEL
namespace opmux::gpu {

// Of one row; k 0 and p 1 keep all.
struct Limits {
  uint32_t k;
  double p;
  bool joint;
};

__device__ inline Limits limits_of(const Filter& f, int64_t row, int64_t size) {
  Limits limits = {0, 1, f.joint};
  if (f.has_k) {
    int64_t k = f.k.all;
    if (f.k.per_row != nullptr) {
      k = f.k.wide ? static_cast<const int64_t*>(f.k.per_row)[row]
                   : static_cast<const int32_t*>(f.k.per_row)[row];
    }
    limits.k = k < 1 || k >= size ? 0 : static_cast<uint32_t>(k);
  }
  if (f.has_p) {
    limits.p = f.p.per_row != nullptr ? static_cast<double>(f.p.per_row[row]) : f.p.all;
    if (!(limits.p > 0)) limits.p = 0;  // NaN too
  }
  return limits;
}

// The thresholds by the radix search, for any row. Every thread of the group holds the result.
template <class T, int kSize>
__device__ inline uint32_t search(const Row<T, kSize>& row, const Work& w, const Limits& limits,
                                  double all) {
  const Cut none = {0, 0, 0, false};
  uint32_t cut = 0;
  double of = all;
  count_level(row, w, 0, none);
  Cut p_cut = none;
  const auto k_reached = [&](uint32_t count, double) { return count >= limits.k; };
  double target = 0;
  const auto p_reached = [&](uint32_t, double mass) { return mass >= target; };
  if (limits.k > 0) {
    const Cut first = walk(w, 0, none, k_reached);
    if (first.reached) {
      cut = refine(row, w, first, k_reached);
      if (limits.p < 1 && !limits.joint) {
        sum_segments(row, w, [&](float v) { return key_of(v) >= cut; }, [](float) {});
        group_sync();
        of = total_mass(row, w);
      }
      if (limits.p < 1) count_level(row, w, 0, none);
    }
  }
  if (limits.p < 1) {
    target = limits.p > 0 ? limits.p * of : 0;
    p_cut = walk(w, 0, none, p_reached);
    const uint32_t p_key = refine(row, w, p_cut, p_reached);
    cut = p_key > cut ? p_key : cut;
  }
  return cut;
}

// Every thread of the group holds threshold and total; thread 0 of the first block the token.
template <class T, int kSize>
__device__ inline Kept filter_row(const Row<T, kSize>& row, const Work& w, const Limits& limits,
                                  bool draws, double uniform) {
  const bool filters = limits.k > 0 || limits.p < 1;
  if (filters) clear_histogram(w);
  sum_segments(
      row, w, [](float) { return true; },
      [&](float largest) {
        const uint32_t key = key_of(largest);
        if (filters && key != 0) add_key(w, key, level_shift(0));
      });
  group_sync();
  const double all = total_mass(row, w);
  Kept kept = {0, all, -1};
  if (!(all > 0)) return kept;
  if (filters) {
    // Of n values at most n are above the k-th largest; rounding may miss p by less than 2^-30.
    const double enough = limits.p * all * (1 + 0x1p-30);
    const Cut bound = walk(w, 0, {0, 0, 0, false}, [&](uint32_t count, double mass) {
      return limits.k > 0 ? count >= limits.k : mass >= enough;
    });
    uint32_t n = 0;
    if (bound.reached && collect(row, w, bound.key, &n)) {
      if (row.rank == 0) {
        const double of = limits.k > 0 && !limits.joint ? -1 : all;
        kept = pick(w, row.ranks, n, limits.k, limits.p, of, draws, uniform);
        if (threadIdx.x == 0) {
          w.number[1] = kept.total;
          w.word[1] = float_as_bits(kept.threshold);
        }
      }
      group_sync();
      kept.total = group_read(w.number, 0, 1);
      kept.threshold = bits_as_float(group_read(w.word, 0, 1));
      return kept;
    }
    const uint32_t cut = search(row, w, limits, all);
    kept.threshold = bits_as_float(cut);
    group_sync();  // the masses are still read
    sum_segments(row, w, [&](float v) { return v >= kept.threshold; }, [](float) {});
    group_sync();
    kept.total = total_mass(row, w);
  }
  if (draws) {
    kept.token = draw(row, w, [&](float v) { return v >= kept.threshold; }, uniform);
  }
  return kept;
}

// Writes this block's part of the renormalised row.
template <class T, int kSize>
__device__ inline void renormalise(const Row<T, kSize>& row, const Kept& kept, float* out) {
  // a reciprocal in float64 is off by less than float32 can show
  const double scale = kept.total > 0 ? 1 / kept.total : 0;
  row.for_each([&](float v, uint32_t index) {
    const bool stays = v > 0 && v >= kept.threshold;
    out[index] = stays ? static_cast<float>(static_cast<double>(v) * scale) : 0.0f;
  });
}

template <class T, int kSize>
__global__ void __launch_bounds__(kRowThreads) filter_kernel(FilterLaunch a) {
  OPMUX_ROW_WORK(w);
  wait_for_previous();
  let_next_start();
  const uint32_t index = blockIdx.x / static_cast<uint32_t>(group_size());
  const Row<T, kSize> row(a.probs, index);
  const Limits limits = limits_of(a.filter, index, a.probs.size);
  const bool draws = a.uniform != nullptr;
  const double uniform = draws ? static_cast<double>(a.uniform[index]) : 0;
  const Kept kept = filter_row(row, w, limits, draws, uniform);
  if (draws) {
    if (row.rank == 0 && threadIdx.x == 0) a.tokens[index] = kept.token;
  } else {
    renormalise(row, kept, a.out + static_cast<int64_t>(index) * a.out_stride);
  }
  group_sync();  // a block's shared memory is read by the others until here
}

// Calls f(TypeTag<T>, std::integral_constant<int, kSize>) for the widest vectors that fit.
template <class F>
void for_vectors(const Probs& probs, const F& f) {
  for_float_type(probs.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const Plane<1> plane = {
        {const_cast<void*>(probs.data)}, {probs.stride}, {0}, probs.rows, probs.rows};
    if (probs.size % kFull<T> == 0 && aligned_rows(plane, sizeof(T), kVectorBytes)) {
      f(tag, std::integral_constant<int, kFull<T>>{});
    } else {
      f(tag, std::integral_constant<int, 1>{});
    }
  });
}

// How many blocks share a row: as many as there is room for at one block a processor, while each
// still has enough to read.
inline int blocks_per_row(const Probs& probs) {
  constexpr int64_t kLeast = 8192;
  int group = vendor::max_group();
  const int64_t processors = vendor::device().processors;
  while (group > 1 && (probs.rows * group > processors || probs.size < group * kLeast)) group /= 2;
  return group;
}

}  // namespace opmux::gpu
#endif
