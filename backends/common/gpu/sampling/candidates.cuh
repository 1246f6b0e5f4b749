// SPDX-License-Identifier: Apache-2.0
// Tokens that could stay: the blocks of a row note them, each block that needs them reads them all.
#pragma once

#include "sampling/row.cuh"

#if OPMUX_KERNEL
namespace opmux::gpu {

// Keys from 2^-22 to 2^-6 have buckets, 32 an octave. Normalised rows have at most 64 larger ones,
// which are *heavy*.
struct Buckets {
  static constexpr int kShift = 18;
  static constexpr uint32_t kHeavy = static_cast<uint32_t>(127 - 6) << 23;
  static constexpr int kFirst = static_cast<int>(kHeavy >> kShift) - kBuckets;
  static_assert(kBuckets << kShift == 16 << 23);

  static __device__ int of(uint32_t key) {  // negative: smaller; kBuckets and more: heavy
    return static_cast<int>(key >> kShift) - kFirst;
  }
  static __device__ uint32_t low(int bucket) {
    return static_cast<uint32_t>(kFirst + bucket) << kShift;
  }
};

struct Hit {
  int bucket;    // negative: none reaches
  double above;  // the sum of those above
};

// Goes down the buckets, whose sums the threads hold, thread 0 that of the last: which is the first
// that, with all above, reaches the target? All threads get the same.
__device__ inline Hit walk(const Work& w, double above, double own, double target) {
  const double before = above + sum_before(own, w.sums);
  const uint32_t hit = first_of(w, own > 0 && before + own >= target, threadIdx.x);
  if (hit == kNone) return {-1, 0};
  if (threadIdx.x == hit) w.number[0] = before;
  __syncthreads();
  const Hit result = {kBuckets - 1 - static_cast<int>(hit), w.number[0]};
  __syncthreads();
  return result;
}
__device__ inline int own_bucket() { return kBuckets - 1 - static_cast<int>(threadIdx.x); }

// Notes what this block found; given_words[0] counts.
__device__ inline void note(const Work& w, uint32_t key, uint32_t index) {
  const uint32_t place = atomic_add(w.given_words, 0, 1u);
  if (place >= kFound) return;
  w.found_key[static_cast<int>(place)] = key;
  w.found_place[static_cast<int>(place)] = index;
}

// What all blocks noted, after group_sync.
struct Noted {
  uint32_t own;  // of the block whose rank is this thread's lane
  uint32_t all;
  bool fits;

  __device__ Noted(const Ranks& ranks, const Work& w)
      : own(ranks.read(w.given_words, 0)),
        all(reduce_lanes<kWarp>(own, Add{})),
        fits(reduce_lanes<kWarp>(own, Max{}) <= kFound) {}

  // Calls f(key, rank, i) for them, shared out among the block's threads. All threads call it.
  template <class F>
  __device__ void for_each(const Work& w, const F& f) const {
    const uint32_t most = reduce_lanes<kWarp>(own, Max{});
    for (uint32_t from = 0; from < most; from += kRowThreads) {
      const uint32_t i = from + threadIdx.x;
      uint32_t key[kMaxRanks];
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {  // in flight together
        const uint32_t count = shuffle(own, r);
        key[r] = i < count ? group_read(w.found_key, r, static_cast<int>(i)) : 0;
      }
#pragma unroll
      for (int r = 0; r < kMaxRanks; ++r) {
        if (key[r] != 0) f(key[r], r, i);
      }
    }
  }
};

// Sorts the pairs of the first n threads, no two of them equal, into w.sorted, largest first.
__device__ inline void sort_pairs(const Work& w, uint32_t n, uint64_t own) {
  if (threadIdx.x < n) w.pair[static_cast<int>(threadIdx.x)] = own;
  __syncthreads();
  if (threadIdx.x < n) {
    uint32_t larger = 0;
#pragma unroll 8
    for (uint32_t i = 0; i < n; ++i) larger += w.pair[static_cast<int>(i)] > own;
    w.sorted[static_cast<int>(larger)] = own;
  }
  __syncthreads();
}

// Sorts those with keys in [low, high) into w.sorted: key, descending, then place, ascending.
// Returns how many they are; more than kSorted are not sorted.
__device__ inline uint32_t gather(const Work& w, const Noted& noted, uint32_t low, uint32_t high) {
  if (threadIdx.x == 0) w.word[0] = 0;
  __syncthreads();
  noted.for_each(w, [&](uint32_t key, int rank, uint32_t i) {
    if (key < low || key >= high) return;
    const uint32_t place = group_read(w.found_place, rank, static_cast<int>(i));
    const uint32_t at = atomic_add(w.word, 0, 1u);
    if (at >= kSorted) return;
    w.sorted[static_cast<int>(at)] =
        static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(~place);
  });
  __syncthreads();
  const uint32_t n = w.word[0];
  if (n > kSorted) return n;
  const uint64_t own =
      threadIdx.x < n ? static_cast<uint64_t>(w.sorted[static_cast<int>(threadIdx.x)]) : 0;
  sort_pairs(w, n, own);
  return n;
}
__device__ inline uint32_t key_at(const Work& w, uint32_t entry) {
  return static_cast<uint32_t>(static_cast<uint64_t>(w.sorted[static_cast<int>(entry)]) >> 32);
}
__device__ inline double value_of(uint32_t key) { return static_cast<double>(bits_as_float(key)); }

// The running sum of the entries, each thread having its own.
__device__ inline double running_sum(const Work& w, double own) {
  const double before = sum_before(own, w.sums);
  __syncthreads();
  return before + own;
}
// The first of n entries whose thread has the condition, else n.
__device__ inline uint32_t first_entry(const Work& w, uint32_t n, bool condition) {
  return reduce_words(w, threadIdx.x < n && condition ? threadIdx.x : n, n, Min{});
}
// What the thread of an entry has.
__device__ inline double sum_at(const Work& w, double own, uint32_t entry) {
  if (threadIdx.x == entry) w.number[0] = own;
  __syncthreads();
  const double sum = w.number[0];
  __syncthreads();
  return sum;
}

// Which tokens stay of a row.
struct Kept {
  float threshold;  // values >= it
  double total;     // their mass
};

// What stays of n sorted candidates; p counts from the mass `of`, if that is negative from what k
// leaves.
__device__ inline Kept pick(const Work& w, uint32_t n, uint32_t k, double p, double of) {
  const uint32_t own_key = threadIdx.x < n ? key_at(w, threadIdx.x) : 0;
  const double running = running_sum(w, value_of(own_key));
  uint32_t cut = key_at(w, (k < n ? k : n) - 1);
  uint32_t kept = first_entry(w, n, own_key < cut);
  if (p < 1) {
    const double target = p > 0 ? p * (of < 0 ? sum_at(w, running, kept - 1) : of) : 0;
    const uint32_t last = first_entry(w, n, running >= target);
    if (last < kept) {
      cut = key_at(w, last);
      kept = first_entry(w, n, own_key < cut);
    }
  }
  return {bits_as_float(cut), sum_at(w, running, kept - 1)};
}

// Draws from the sorted candidates from the threshold on, in the order of the vocabulary. All
// threads hold the token.
__device__ inline int32_t draw_sorted(const Work& w, uint32_t n, float threshold, double uniform) {
  uint64_t own = 0;
  if (threadIdx.x < n) own = w.sorted[static_cast<int>(threadIdx.x)];
  const uint32_t kept =
      first_entry(w, n, static_cast<uint32_t>(own >> 32) < float_as_bits(threshold));
  sort_pairs(w, kept, own << 32 | own >> 32);  // places are the lower halves, inverted
  own = 0;
  if (threadIdx.x < kept) own = w.sorted[static_cast<int>(threadIdx.x)];
  const double running = running_sum(w, value_of(static_cast<uint32_t>(own)));
  const double target = uniform * sum_at(w, running, kept - 1);
  uint32_t token = first_entry(w, kept, running > target);
  token = token < kept ? token : kept - 1;
  const uint64_t pair = w.sorted[static_cast<int>(token)];
  return static_cast<int32_t>(~static_cast<uint32_t>(pair >> 32));
}

}  // namespace opmux::gpu
#endif
