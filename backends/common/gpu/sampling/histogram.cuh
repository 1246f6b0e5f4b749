// SPDX-License-Identifier: Apache-2.0
// The exact search for a threshold, without sorting: a radix search over the keys' upper 11 bits
// (exponent and three bits of the fraction), the next 11 and the last 9. A bucket knows how many
// keys it has and, as an integer, the sum of what its bits leave open: every mass is exact and does
// not depend on the order of additions, nor on how many blocks share the row.
#pragma once

#include "sampling/row.cuh"

#if OPMUX_KERNEL
namespace opmux::gpu {

constexpr int kLevels = 3;
__device__ inline int level_shift(int level) { return level == 0 ? 20 : level == 1 ? 9 : 0; }

// Where a search stands: the threshold lies in the bucket that begins at `key`.
struct Cut {
  uint32_t key;
  uint32_t above_count;  // of keys above the bucket
  double above;          // their mass
  bool reached;          // else the bucket is the lowest that has keys
};

// All threads of the group; it synchronises the group before and after.
__device__ inline void clear_histogram(const Work& w) {
  group_sync();
  for (int i = static_cast<int>(threadIdx.x); i < 3 * kBuckets; i += kRowThreads) w.pool[i] = 0;
  group_sync();
}

__device__ inline void add_key(const Work& w, uint32_t key, int shift) {
  const int bucket = static_cast<int>(key >> shift & (kBuckets - 1));
  const uint32_t rest = key & ((1u << shift) - 1);
  atomic_add(w.pool, bucket, 1u);
  if (shift == 0) return;
  const uint32_t old = atomic_add(w.pool, kBuckets + bucket, rest);
  if (old + rest < old) atomic_add(w.pool, 2 * kBuckets + bucket, 1u);  // the upper half, rarely
}

// The mass of `count` values that share the bits of `key` but for a rest; `rest` sums the rests.
__device__ inline double bucket_mass(uint32_t key, uint32_t count, uint64_t rest) {
  const uint32_t exponent = key >> 23;
  if (exponent == 255) return static_cast<double>(bits_as_float(0x7f800000));
  const uint64_t fraction = (key & 0x7fffff) | (exponent > 0 ? 0x800000 : 0);
  union {
    uint64_t bits;
    double value;
  } scale = {static_cast<uint64_t>((exponent > 0 ? exponent : 1) + 1023 - 150) << 52};
  return static_cast<double>(fraction * count + rest) * scale.value;  // exact below 2^29 values
}

// Goes down the histogram of a level from the largest bucket, until reached(count, mass) of all
// keys in and above a bucket; `cut` has stood above it. The group has synchronised since the last
// add_key. Every thread of the group gets the same.
template <class Reached>
__device__ inline Cut walk(const Work& w, int level, Cut cut, const Reached& reached) {
  constexpr int kPer = kBuckets / kRowThreads;
  const int ranks = group_size(), shift = level_shift(level);
  uint32_t count[kPer], counts = 0;
  double mass[kPer], masses = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {  // this thread's buckets, descending
    const int bucket = kBuckets - 1 - (static_cast<int>(threadIdx.x) * kPer + i);
    uint64_t rest = 0;
    count[i] = 0;
    for (int r = 0; r < ranks; ++r) {
      const uint32_t n = group_read(w.pool, r, bucket);
      if (n == 0) continue;
      count[i] += n;
      rest += group_read(w.pool, r, kBuckets + bucket) +
              (static_cast<uint64_t>(group_read(w.pool, r, 2 * kBuckets + bucket)) << 32);
    }
    const uint32_t low = cut.key | static_cast<uint32_t>(bucket) << shift;
    mass[i] = count[i] > 0 ? bucket_mass(low, count[i], rest) : 0;
    counts += count[i];
    masses += mass[i];
  }
  uint32_t count_above = cut.above_count + sum_before(counts, w.counts);
  double above = cut.above + sum_before(masses, w.sums);
  __syncthreads();
  uint32_t hit = kNone, lowest = 0;
  Cut at_hit = cut, at_lowest = cut;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (count[i] == 0) continue;
    const uint32_t place = threadIdx.x * kPer + i;
    const uint32_t key = cut.key | static_cast<uint32_t>(kBuckets - 1 - static_cast<int>(place))
                                       << shift;
    at_lowest = {key, count_above, above, false};
    lowest = place + 1;
    count_above += count[i];
    above += mass[i];
    if (hit == kNone && reached(count_above, above)) {
      hit = place;
      at_hit = at_lowest;
    }
  }
  const uint32_t first = reduce_words(w, hit, kNone, Min{});
  const uint32_t last = reduce_words(w, lowest, 0, Max{});
  if (last == 0) return {cut.key, cut.above_count, cut.above, false};  // no keys
  const bool is_reached = first != kNone;
  if (is_reached ? hit == first : lowest == last) {
    const Cut found = is_reached ? at_hit : at_lowest;
    w.word[0] = found.key;
    w.word[1] = found.above_count;
    w.number[0] = found.above;
  }
  __syncthreads();
  const Cut found = {w.word[0], w.word[1], w.number[0], is_reached};
  __syncthreads();
  return found;
}

// Adds the keys of the row that lie in the bucket where `cut` stands to a cleared histogram.
template <class T, int kSize>
__device__ inline void count_level(const Row<T, kSize>& row, const Work& w, int level,
                                   const Cut& cut) {
  clear_histogram(w);
  const int shift = level_shift(level);
  const int bits = level == 0 ? 31 : level_shift(level - 1);  // of a key that are open
  row.for_each([&](float v, uint32_t) {
    const uint32_t key = key_of(v);
    if (key != 0 && key >> bits == cut.key >> bits) add_key(w, key, shift);
  });
  group_sync();
}

// The largest key for which reached(count, mass) of all keys >= it holds; the smallest key if none.
// `first` is where the walk over level 0 ended.
template <class T, int kSize, class Reached>
__device__ inline uint32_t refine(const Row<T, kSize>& row, const Work& w, Cut cut,
                                  const Reached& reached) {
  for (int level = 1; level < kLevels; ++level) {
    count_level(row, w, level, cut);
    cut = walk(w, level, cut, reached);
  }
  return cut.key;
}

}  // namespace opmux::gpu
#endif
