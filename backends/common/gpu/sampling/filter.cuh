// SPDX-License-Identifier: Apache-2.0
// Top-k and top-p filters of a row, by a group of blocks. For a small k the k-th largest of some
// values bounds the k-th largest of all from below: what lies above the bound is noted in one pass
// and sorted. Everything else is searched for.
#pragma once

#include "sampling/candidates.cuh"
#include "sampling/filter.h"
#include "sampling/search.cuh"

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

// Notes what could be among the k largest: what is not below the k-th largest of some lanes'
// largest values, a bound that every block finds for itself. The group synchronises after it.
template <class Row>
__device__ inline void note_top(const Row& row, const Work& w, uint32_t k) {
  w.histogram[static_cast<int>(threadIdx.x)] = 0;
  if (threadIdx.x == 0) w.given_words[0] = 0;
  __syncthreads();
  // one vector of each segment, or more of fewer
  const uint32_t per = row.count < Row::kBatch ? Row::kBatch / row.count : 1;
  typename Row::Part part[Row::kBatch] = {};
#pragma unroll
  for (uint32_t j = 0; j < Row::kBatch; ++j) {
    if (j % per < row.steps) part[j] = row.fetch(row.place(row.begin + j / per, j % per));
  }
  float largest = 0;
#pragma unroll
  for (uint32_t j = 0; j < Row::kBatch; ++j) {
#pragma unroll
    for (int i = 0; i < Row::kItems; ++i) {
      const float v = mass_of(to_float(part[j].item[i]));
      largest = v > largest ? v : largest;
    }
  }
  const int bucket = Buckets::of(key_of(largest));
  if (bucket >= 0) atomic_add(w.histogram, bucket < kBuckets ? bucket : kBuckets - 1, 1u);
  __syncthreads();
  const double own = static_cast<double>(static_cast<uint32_t>(w.histogram[own_bucket()]));
  const Hit bound = walk(w, 0.0, own, static_cast<double>(k));
  const uint32_t low = bound.bucket < 0 ? 1 : Buckets::low(bound.bucket);
  if (threadIdx.x == 0) w.given_words[1] = low;
  row.for_each(
      [&](float v, uint32_t index) {
        if (key_of(v) >= low) note(w, key_of(v), index);
      },
      [](uint32_t) {});
}

// Sorts those of the noted values that could be among the k largest; returns how many they are.
__device__ inline uint32_t gather_top(const Ranks& ranks, const Work& w, const Noted& noted,
                                      uint32_t k) {
  uint32_t low = reduce_lanes<kWarp>(ranks.read(w.given_words, 1), Max{});
  if (noted.all > kSorted / 4) {
    __syncthreads();
    w.copies[static_cast<int>(threadIdx.x)] = 0;
    __syncthreads();
    noted.for_each(w, [&](uint32_t key, int, uint32_t) {
      const int bucket = Buckets::of(key);
      if (bucket >= 0) atomic_add(w.copies, bucket < kBuckets ? bucket : kBuckets - 1, 1u);
    });
    __syncthreads();
    const double own = static_cast<double>(static_cast<uint32_t>(w.copies[own_bucket()]));
    const Hit bound = walk(w, 0.0, own, static_cast<double>(k));
    if (bound.bucket >= 0 && Buckets::low(bound.bucket) > low) low = Buckets::low(bound.bucket);
  }
  return gather(w, noted, low, 0x80000000u);
}

// Draws the token, or returns threshold and total in every thread.
template <class Row>
__device__ inline Kept filter_row(const Row& row, Ranks& ranks, const Work& w, const Limits& limits,
                                  double uniform, int32_t* token) {
  constexpr uint32_t kFew = 128;  // of 512 lanes' largest values
  const bool draws = token != nullptr;
  uint32_t cut = 0;
  double all = -1;
  bool has_masses = false;
  if (limits.k > 0) {
    const bool p_of_all = limits.p < 1 && limits.joint;
    if (limits.k <= kFew) {
      note_top(row, w, limits.k);
      if (p_of_all) sum_segments(row, w, 0, [](float v, uint32_t) { return v; });
      group_sync();
      const Noted noted(ranks, w);
      const uint32_t n = noted.fits ? gather_top(ranks, w, noted, limits.k) : kNone;
      if (n > 0 && n <= kSorted) {
        if (p_of_all) all = total_of(w, segment_mass(row, w, 0));
        const Kept kept = pick(w, n, limits.k, limits.p, all);
        if (draws && ranks.rank == 0) {
          const int32_t drawn = draw_sorted(w, n, kept.threshold, uniform);
          if (threadIdx.x == 0) *token = drawn;
        }
        return kept;
      }
      group_sync();  // what was noted is still read
    }
    cut = search<true>(row, ranks, w, {0, static_cast<double>(limits.k)}).key;
    group_sync();
  }
  if (limits.p < 1) {
    // p counts from what k leaves, or from all
    const Found found = search<false>(row, ranks, w, {limits.joint ? 0 : cut, limits.p});
    has_masses = found.masses == Masses::kOfKept && found.key >= cut;
    cut = found.key > cut ? found.key : cut;
  }
  const float threshold = bits_as_float(cut);
  const auto keep = [&](float v) { return v >= threshold; };
  if (!has_masses) {
    group_sync();  // masses are still read
    sum_segments(row, w, 1,
                 [&](float v, uint32_t) { return keep(v) ? static_cast<double>(v) : 0.0; });
    group_sync();
  }
  const double mass = segment_mass(row, w, 1);
  if (!draws) return {threshold, total_of(w, mass)};
  draw(row, ranks, w, mass, keep, uniform, token);
  return {};
}

// Writes this block's part of the renormalised row.
template <class T, int kSize>
__device__ inline void renormalise(const Row<T, kSize>& row, const Kept& kept, float* out) {
  // a reciprocal in float64 is off by less than float32 can show
  const double scale = kept.total > 0 ? 1 / kept.total : 0;
  for (uint32_t s = row.begin; s < row.begin + row.count; ++s) {
    row.for_vectors(s, [&](const Vec<T, kSize>& vector, uint32_t at) {
      if (at >= row.vectors) return;
      constexpr int kPart = kSize < kFull<float> ? kSize : kFull<float>;
      float* to = out + static_cast<int64_t>(at) * kSize;
#pragma unroll
      for (int p = 0; p < kSize; p += kPart) {
        Vec<float, kPart> part;
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          const float v = to_float(vector.item[p + i]);
          part.item[i] = 0;
          if (v > 0 && v >= kept.threshold) {
            part.item[i] = static_cast<float>(static_cast<double>(v) * scale);
          }
        }
        store_streaming(to + p, part);
      }
    });
  }
}

template <class T, int kSize>
__global__ void __launch_bounds__(kRowThreads, 2) filter_kernel(FilterLaunch a) {
  OPMUX_ROW_WORK(w);
  wait_for_previous();
  let_next_start();
  Ranks ranks;
  const uint32_t index = blockIdx.x / static_cast<uint32_t>(ranks.size);
  const Row<T, kSize> row(a.probs, index, ranks);
  const Limits limits = limits_of(a.filter, index, a.probs.size);
  const bool draws = a.uniform != nullptr;
  const double uniform = draws ? static_cast<double>(a.uniform[index]) : 0;
  int32_t* token = draws ? a.tokens + index : nullptr;
  const Kept kept = filter_row(row, ranks, w, limits, uniform, token);
  if (!draws) renormalise(row, kept, a.out + static_cast<int64_t>(index) * a.out_stride);
  group_sync();  // a block's shared memory is read by the others until here
}

// How many blocks share a row, while each still has enough to read: for few rows as many as there
// are processors for, else two, of which a processor takes as many. What a group does to agree
// costs more than it saves sooner than that.
inline int blocks_per_row(const Probs& probs) {
  constexpr int64_t kLeast = 4096;
  const int64_t processors = vendor::device().processors;
  int group = vendor::max_group() < kMaxRanks ? vendor::max_group() : kMaxRanks;
  while (group > 1 &&
         (probs.rows * group > processors * (group == 2 ? 2 : 1) || probs.size < group * kLeast)) {
    group /= 2;
  }
  return group;
}

// Calls f(TypeTag<T>, std::integral_constant<int, kSize>) for the widest vectors that fit `probs`
// and, if there is one, `out`.
template <class F>
void for_rows(const Probs& probs, const float* out, int64_t out_stride, const F& f) {
  for_float_type(probs.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const uint64_t bytes =
        reinterpret_cast<uintptr_t>(probs.data) | static_cast<uint64_t>(probs.stride) * sizeof(T) |
        static_cast<uint64_t>(probs.size) * sizeof(T) | reinterpret_cast<uintptr_t>(out) |
        static_cast<uint64_t>(out_stride) * sizeof(float);
    if (bytes % kVectorBytes == 0) {
      f(tag, std::integral_constant<int, kFull<T>>{});
    } else {
      f(tag, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace opmux::gpu
#endif
