// SPDX-License-Identifier: Apache-2.0
// The usual case, in which few tokens stay: those that could are collected and sorted by the first
// block of the group.
#pragma once

#include "sampling/row.cuh"

#if OPMUX_KERNEL
namespace opmux::gpu {

// Which tokens stay of a row, and what was drawn of them.
struct Kept {
  float threshold;  // values >= it stay
  double total;     // their mass
  int32_t token;
};

// Sorts n pairs (list[i], list[kCandidates + i]) ascending; n is a power of two.
__device__ inline void sort_pairs(const Work& w, uint32_t n) {
  const auto at = [&](uint32_t i) { return static_cast<int>(i); };
  for (uint32_t size = 2; size <= n; size *= 2) {
    for (uint32_t step = size / 2; step > 0; step /= 2) {
      const uint32_t pair = threadIdx.x;
      if (pair < n / 2) {
        const uint32_t low = 2 * pair - (pair & (step - 1)), high = low + step;
        const uint32_t a = w.list[at(low)], b = w.list[at(high)];
        const uint32_t a2 = w.list[at(low + kCandidates)], b2 = w.list[at(high + kCandidates)];
        const bool ordered = a < b || (a == b && a2 <= b2), ascending = (low & size) == 0;
        if (ordered != ascending) {
          w.list[at(low)] = b;
          w.list[at(high)] = a;
          w.list[at(low + kCandidates)] = b2;
          w.list[at(high + kCandidates)] = a2;
        }
      }
      __syncthreads();
    }
  }
}

__device__ inline uint32_t power_of_two(uint32_t n) {
  uint32_t size = 1;
  while (size < n) size *= 2;
  return size;
}

// Running masses of the two sorted entries that each thread holds.
struct Running {
  double at[2];
};
template <class Key>
__device__ inline Running running_masses(const Work& w, uint32_t n, const Key& key) {
  double mass[2];
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t entry = 2 * threadIdx.x + i;
    mass[i] = entry < n ? static_cast<double>(bits_as_float(key(entry))) : 0;
  }
  const double before = sum_before(mass[0] + mass[1], w.sums);
  __syncthreads();
  return {{before + mass[0], before + mass[0] + mass[1]}};
}

// The first of n entries for which condition(entry, its running mass) holds, else n.
template <class Condition>
__device__ inline uint32_t first_entry(const Work& w, uint32_t n, const Running& running,
                                       const Condition& condition) {
  uint32_t first = n;
  for (uint32_t i = 2; i-- > 0;) {
    const uint32_t entry = 2 * threadIdx.x + i;
    if (entry < n && condition(entry, running.at[i])) first = entry;
  }
  return reduce_words(w, first, n, Min{});
}

__device__ inline double mass_at(const Work& w, const Running& running, uint32_t entry) {
  if (threadIdx.x == entry / 2) w.number[0] = running.at[entry % 2];
  __syncthreads();
  const double mass = w.number[0];
  __syncthreads();
  return mass;
}

// Collects keys >= low with their places. False if there are too many; the same for the group.
template <class T, int kSize>
__device__ inline bool collect(const Row<T, kSize>& row, const Work& w, uint32_t low,
                               uint32_t* found) {
  group_sync();  // the pool is still read as a histogram
  if (threadIdx.x == 0) w.word[0] = 0;
  __syncthreads();
  row.for_each([&](float v, uint32_t index) {
    const uint32_t key = key_of(v);
    if (key < low) return;
    const uint32_t place = atomic_add(w.word, 0, 1u);
    if (place >= kCandidates) return;
    w.pool[static_cast<int>(place)] = key;
    w.pool[static_cast<int>(place) + kCandidates] = index;
  });
  group_sync();
  uint32_t n = 0;
  for (int r = 0; r < row.ranks; ++r) n += group_read(w.word, r, 0);
  *found = n;
  return n <= kCandidates;
}

// What stays of n collected candidates; first block only. `k` 0 and `p` 1 keep all; p counts from
// the mass `of`, if that is negative from what k leaves.
__device__ inline Kept pick(const Work& w, int ranks, uint32_t n, uint32_t k, double p, double of,
                            bool draws, double uniform) {
  const auto index = [](uint32_t i) { return static_cast<int>(i); };
  // In order of keys, descending, then of places: no order of collection shows.
  const uint32_t padded = power_of_two(n);
  for (uint32_t i = n + threadIdx.x; i < padded; i += kRowThreads) {
    w.list[index(i)] = w.list[index(i + kCandidates)] = kNone;
  }
  uint32_t begin = 0;
  for (int r = 0; r < ranks; ++r) {
    const uint32_t part = group_read(w.word, r, 0);
    for (uint32_t i = threadIdx.x; i < part; i += kRowThreads) {
      w.list[index(begin + i)] = ~group_read(w.pool, r, index(i));
      w.list[index(begin + i + kCandidates)] = group_read(w.pool, r, index(i + kCandidates));
    }
    begin += part;
  }
  __syncthreads();
  sort_pairs(w, padded);

  const auto key = [&](uint32_t entry) { return ~static_cast<uint32_t>(w.list[index(entry)]); };
  const Running running = running_masses(w, n, key);
  uint32_t cut = 0, kept = n;
  const auto cut_at = [&](uint32_t threshold) {
    cut = threshold;
    kept = first_entry(w, n, running, [&](uint32_t e, double) { return key(e) < cut; });
  };
  if (k > 0 && k <= n) cut_at(key(k - 1));
  if (p < 1) {
    const double target = p > 0 ? p * (of < 0 ? mass_at(w, running, kept - 1) : of) : 0;
    const uint32_t last =
        first_entry(w, n, running, [&](uint32_t, double mass) { return mass >= target; });
    if (last < kept) cut_at(key(last));
  }
  Kept result = {bits_as_float(cut), mass_at(w, running, kept - 1), -1};
  if (!draws) return result;

  // In the order of the vocabulary. A thread reads its pairs before any is overwritten.
  uint32_t own_key[2], own_place[2];
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t entry = 2 * threadIdx.x + i;
    own_key[i] = entry < kept ? key(entry) : 0;
    own_place[i] = entry < kept ? static_cast<uint32_t>(w.list[index(entry + kCandidates)]) : kNone;
  }
  __syncthreads();
  for (uint32_t i = 0; i < 2; ++i) {
    w.list[index(2 * threadIdx.x + i)] = own_place[i];
    w.list[index(2 * threadIdx.x + i + kCandidates)] = own_key[i];
  }
  __syncthreads();
  sort_pairs(w, power_of_two(kept));
  const Running drawn = running_masses(w, kept, [&](uint32_t entry) {
    return static_cast<uint32_t>(w.list[index(entry + kCandidates)]);
  });
  const double target = uniform * mass_at(w, drawn, kept - 1);
  const uint32_t token =
      first_entry(w, kept, drawn, [&](uint32_t, double mass) { return mass > target; });
  result.token = static_cast<int32_t>(w.list[index(token < kept ? token : kept - 1)]);
  return result;
}

}  // namespace opmux::gpu
#endif
