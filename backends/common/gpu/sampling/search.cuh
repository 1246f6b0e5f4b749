// SPDX-License-Identifier: Apache-2.0
// The search for a threshold in any row, without sorting it: a histogram over the bits of the keys
// guesses the 32nd of an octave in which it lies; the next pass notes the values there.
//
// The histogram holds rounded masses, one addition a value. Sums in float64 then show whether the
// guess was right; if not, bisection finds the threshold.
#pragma once

#include "sampling/candidates.cuh"

#if OPMUX_KERNEL
namespace opmux::gpu {

// What is searched: the largest key of which it and all above count or weigh enough.
struct Wanted {
  uint32_t least;  // smaller keys do not count
  double share;    // how many, or a part of the mass of all that count
};

// What a search leaves in half 1 of w.mass.
enum class Masses { kOfKept, kNone };

struct Found {
  uint32_t key;  // 0 where nothing is reached, which keeps all
  Masses masses;
};

// The sums of this block's histogram, over its copies and, after group_sync, over all blocks.
__device__ inline void fold_copies(const Work& w) {
  __syncthreads();
  const int bucket = static_cast<int>(threadIdx.x);
  uint32_t sum = 0;
#pragma unroll
  for (int c = 0; c < kCopies; ++c) sum += w.copies[bucket * kCopies + c];
  w.histogram[bucket] = sum;
}
__device__ inline double bucket_sum(const Ranks& ranks, const Work& w) {
  uint64_t sum = 0;
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {  // in flight together
    if (r < ranks.size) sum += group_read(w.histogram, r, own_bucket());
  }
  return static_cast<double>(sum);
}

// What histograms add up: 1, or a mantissa, rounded so that a quarter of what a block has of a
// usual row fits 32 bits; if not, the guess is wrong.
template <bool kCounts>
struct Entry {
  int drop;

  __device__ uint32_t operator()(uint32_t key) const {
    const uint32_t mantissa = (key & 0x7fffff) | 0x800000;
    return kCounts ? 1u : (mantissa + (1u << drop >> 1)) >> drop;
  }
  __device__ double unit(uint32_t key) const {  // of subnormal values another
    union {
      uint64_t bits;
      double value;
    } power = {static_cast<uint64_t>(static_cast<int>(key >> 23) + drop + 1023 - 150) << 52};
    return kCounts ? 1.0 : power.value;
  }
};

// Adds what this block noted from the key on to its segments: mantissas of one octave, exactly.
template <class Row>
__device__ inline void add_noted(const Row& row, Ranks& ranks, const Work& w, uint32_t key) {
  constexpr int kHalf = 12;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kSegments; i += kRowThreads) w.more[i] = 0;
  __syncthreads();
  const uint32_t count = w.given_words[0];
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(count); i += kRowThreads) {
    const uint32_t own = w.found_key[i];
    if (own < key) continue;
    const uint32_t mantissa = (own & 0x7fffff) | 0x800000;
    const int segment = static_cast<int>(row.segment_of(w.found_place[i]));
    atomic_add(w.more, 2 * segment, mantissa & ((1u << kHalf) - 1));
    atomic_add(w.more, 2 * segment + 1, mantissa >> kHalf);
  }
  group_sync();  // masses are still read
  const int segment = static_cast<int>(threadIdx.x);
  if (segment < kSegments && row.owner(threadIdx.x) == ranks.rank) {
    const double mantissas = static_cast<double>(
        w.more[2 * segment] + (static_cast<uint64_t>(w.more[2 * segment + 1]) << kHalf));
    w.mass[kSegments + segment] += mantissas * Entry<false>{0}.unit(key);
  }
  group_sync();
}

// Every thread of the group holds the result. The group has synchronised since w.mass was read.
template <bool kCounts, class Row>
__device__ inline Found search(const Row& row, Ranks& ranks, const Work& w, const Wanted& wanted) {
  const auto weight = [](float v) { return kCounts ? 1.0 : static_cast<double>(v); };
  const uint32_t least = wanted.least > 0 ? wanted.least : 1;
  Entry<kCounts> entry = {4};
  while (row.vectors / static_cast<uint32_t>(ranks.size) * Row::kItems >> (entry.drop + 14)) {
    ++entry.drop;
  }

  for (int c = 0; c < kCopies; ++c) {
    w.copies[c * kRowThreads + static_cast<int>(threadIdx.x)] = 0;
  }
  if (threadIdx.x == 0) w.given_words[0] = 0;
  __syncthreads();
  const int copy = lane_index() % kCopies;
  double own_heavy = 0;
  sum_segments(row, w, 0, [&](float v, uint32_t) {
    const uint32_t key = key_of(v);
    if (key < least) return 0.0;
    const int bucket = Buckets::of(key);
    if (bucket >= kBuckets) {
      own_heavy += weight(v);
    } else if (bucket >= 0) {
      atomic_add(w.copies, bucket * kCopies + copy, entry(key));
    }
    return weight(v);
  });
  fold_copies(w);
  const double heavy = sum_group(ranks, w, own_heavy);
  const double all = total_of(w, segment_mass(row, w, 0));
  const double target = kCounts ? wanted.share : wanted.share * all;
  const auto reached = [&](double sum) { return sum > 0 && sum >= target; };
  if (!reached(all)) return {0, Masses::kNone};
  uint32_t low = Buckets::kHeavy, high = 0x80000000u;
  if (!reached(heavy)) {
    const double mass = bucket_sum(ranks, w) * entry.unit(Buckets::low(own_bucket()));
    const Hit hit = walk(w, heavy, mass, target);
    low = hit.bucket < 0 ? 1 : Buckets::low(hit.bucket);
    high = Buckets::low(hit.bucket < 0 ? 0 : hit.bucket + 1);
  }

  bool in_octave = false;
  for (int attempt = 0;; ++attempt) {
    sum_segments(row, w, 1, [&](float v, uint32_t index) {
      const uint32_t key = key_of(v);
      if (key >= high) return weight(v);
      if (key >= low && key >= least) note(w, key, index);
      return 0.0;
    });
    group_sync();
    const Noted noted(ranks, w);
    const double before = total_of(w, segment_mass(row, w, 1));
    double above = before;
    in_octave = low >> 23 == (high - 1) >> 23 && low >= 1u << 23;
    uint32_t first = low, last = high;  // of those that are sorted
    if (noted.fits && noted.all > kSorted / 4 && in_octave) {
      int shift = 0;
      while ((high - low - 1) >> shift >= kBuckets) ++shift;
      const Entry<kCounts> finer = {4};
      w.copies[static_cast<int>(threadIdx.x)] = 0;
      __syncthreads();
      noted.for_each(w, [&](uint32_t key, int, uint32_t) {
        atomic_add(w.copies, static_cast<int>((key - low) >> shift), finer(key));
      });
      __syncthreads();
      const double mass = static_cast<double>(w.copies[own_bucket()]) * finer.unit(low);
      const Hit hit = walk(w, above, mass, target);
      if (hit.bucket >= 0) {
        first = low + (static_cast<uint32_t>(hit.bucket) << shift);
        last = first + (1u << shift);
      }
      double own = 0;  // sums within an octave are exact in any order
      noted.for_each(w, [&](uint32_t key, int, uint32_t) {
        if (key >= last) own += weight(bits_as_float(key));
      });
      above += reduce_block(own, 0.0, Add{}, w.sums);
      __syncthreads();
    }
    if (noted.fits && !reached(above)) {
      const uint32_t n = gather(w, noted, first, last);
      uint32_t key = 0;
      if (n > 0 && n <= kSorted) {
        const uint32_t own_key = threadIdx.x < n ? key_at(w, threadIdx.x) : 0;
        const double own = threadIdx.x < n ? weight(bits_as_float(own_key)) : 0;
        const uint32_t hit = first_entry(w, n, reached(above + running_sum(w, own)));
        if (hit < n) key = key_at(w, hit);
      }
      if (n > kSorted && in_octave) {  // many equal ones
        const auto from = [&](uint32_t smallest) {
          double own = 0;
          noted.for_each(w, [&](uint32_t k, int, uint32_t) {
            if (k >= smallest && k < last) own += weight(bits_as_float(k));
          });
          const double sum = reduce_block(own, 0.0, Add{}, w.sums);
          __syncthreads();
          return above + sum;
        };
        if (reached(from(first))) {
          key = first;
          for (uint32_t end = last; end - key > 1;) {
            const uint32_t middle = key + (end - key) / 2;
            (reached(from(middle)) ? key : end) = middle;
          }
        }
      }
      if (key != 0) {
        if (kCounts || !in_octave) return {key, Masses::kNone};
        add_noted(row, ranks, w, key);
        return {key, Masses::kOfKept};
      }
    }
    if (attempt == 1 || !noted.fits || !in_octave) break;
    // The histogram was off by one: the bucket next to it.
    constexpr uint32_t kSize = 1u << Buckets::kShift;
    low = reached(before) ? high : low - kSize;
    high = low + kSize;
    group_sync();  // masses and what was noted are still read
    if (threadIdx.x == 0) w.given_words[0] = 0;
    __syncthreads();
  }

  // Too many values, or a wrong guess. floor: reaches it; ceiling: does not.
  const auto reaches = [&](uint32_t smallest) {
    group_sync();  // masses are still read
    sum_segments(row, w, 0, [&](float v, uint32_t) {
      return key_of(v) >= smallest && key_of(v) >= least ? weight(v) : 0.0;
    });
    group_sync();
    return reached(total_of(w, segment_mass(row, w, 0)));
  };
  uint32_t floor = 0, ceiling = 0x80000000u;
  if (in_octave) (reaches(low) ? floor : ceiling) = low;
  if (in_octave && floor == low && !reaches(high)) ceiling = high;
  while (ceiling - floor > Row::kGrain) {
    const uint32_t middle = floor + (ceiling - floor) / (2 * Row::kGrain) * Row::kGrain;
    (reaches(middle) ? floor : ceiling) = middle;
  }
  return {floor, Masses::kNone};
}

}  // namespace opmux::gpu
#endif
