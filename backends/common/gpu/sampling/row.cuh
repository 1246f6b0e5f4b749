// SPDX-License-Identifier: Apache-2.0
// A row of probabilities and the group of blocks that works on it; its mass, and a draw from it.
//
// Masses are sums in float64 over *segments*, whose bounds and whose order of additions follow from
// the length of the row alone: a row gives the same token whether one block works on it or eight.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

#include "reduce.cuh"
#include "sampling/filter.h"
#include "vec.cuh"

namespace opmux::gpu {

constexpr int kRowThreads = 1024;
constexpr int kMaxSegments = 512;  // at most one for each thread of a block
constexpr int kTiles = 4;          // loads that a lane has in flight
constexpr int kBuckets = 2048;
constexpr int kCandidates = 2 * kRowThreads;
constexpr uint32_t kNone = 0xffffffff;

// The bits of floats that are not negative are ordered like their values.
__device__ inline uint32_t key_of(float v) { return v > 0 ? float_as_bits(v) : 0; }  // NaN: 0

// Shared memory of a block.
struct Work {
  Shared<uint32_t, 3 * kBuckets>& pool;     // a histogram, or candidates
  Shared<uint32_t, 2 * kCandidates>& list;  // candidates of all blocks, in the first one
  Shared<double, kMaxSegments>& mass;       // of this block's segments
  Shared<double, kMaxWarps>& sums;          // scratch of reductions
  Shared<uint32_t, kMaxWarps>& counts;
  Shared<double, 4>& number;  // results for other threads and blocks
  Shared<uint32_t, 4>& word;
};

#define OPMUX_ROW_WORK(work)                                                 \
  __shared__ Shared<uint32_t, 3 * kBuckets> work##_pool;                     \
  __shared__ Shared<uint32_t, 2 * kCandidates> work##_list;                  \
  __shared__ Shared<double, kMaxSegments> work##_mass;                       \
  __shared__ Shared<double, kMaxWarps> work##_sums;                          \
  __shared__ Shared<uint32_t, kMaxWarps> work##_counts;                      \
  __shared__ Shared<double, 4> work##_number;                                \
  __shared__ Shared<uint32_t, 4> work##_word;                                \
  const Work work = {work##_pool,   work##_list,   work##_mass, work##_sums, \
                     work##_counts, work##_number, work##_word}

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
constexpr int kRowWarps = kRowThreads / kWarp;

// Reductions that leave their scratch free for the next.
template <class F>
__device__ inline uint32_t reduce_words(const Work& w, uint32_t value, uint32_t identity,
                                        const F& f) {
  const uint32_t result = reduce_block(value, identity, f, w.counts);
  __syncthreads();
  return result;
}
__device__ inline uint32_t first_of(const Work& w, bool condition, uint32_t place) {
  return reduce_words(w, condition ? place : kNone, kNone, Min{});
}

// The row of this block's group, in vectors of kSize.
template <class T, int kSize>
struct Row {
  const T* data;
  uint32_t vectors;
  uint32_t tiles;  // of kWarp vectors, a segment; a multiple of kTiles
  uint32_t segments;
  int rank, ranks;  // of the group's blocks

  __device__ Row(const Probs& probs, uint32_t row)
      : data(static_cast<const T*>(probs.data) + static_cast<int64_t>(row) * probs.stride),
        vectors(static_cast<uint32_t>(probs.size / kSize)),
        rank(group_rank()),
        ranks(group_size()) {
    const uint32_t step = kWarp * kTiles;
    tiles = kTiles * ((vectors + step * kMaxSegments - 1) / (step * kMaxSegments));
    segments = (vectors + kWarp * tiles - 1) / (kWarp * tiles);
  }

  __device__ Vec<T, kSize> vector(uint32_t i) const {
    return load<kSize>(data + static_cast<int64_t>(i < vectors ? i : vectors - 1) * kSize);
  }

  // Calls f(value, index) for this block's part of the row, in any order.
  template <class F>
  __device__ void for_each(const F& f) const {
    const uint32_t step = static_cast<uint32_t>(ranks) * kRowThreads;
    const uint32_t mine = static_cast<uint32_t>(rank) * kRowThreads + threadIdx.x;
    for (uint32_t first = mine; first < vectors; first += step * kTiles) {
      Vec<T, kSize> in[kTiles];
#pragma unroll
      for (uint32_t j = 0; j < kTiles; ++j) in[j] = vector(first + j * step);
#pragma unroll
      for (uint32_t j = 0; j < kTiles; ++j) {
        const uint32_t at = first + j * step;
        if (at >= vectors) break;
#pragma unroll
        for (int i = 0; i < kSize; ++i) f(to_float(in[j].item[i]), at * kSize + i);
      }
    }
  }

  // The mass of segment s, after sum_segments and group_sync; for s behind the last, 0.
  __device__ double mass(const Work& w, uint32_t s) const {
    if (s >= segments) return 0;
    return group_read(w.mass, static_cast<int>(s / kRowWarps) % ranks, static_cast<int>(s));
  }
};

// Sums what keep(value) keeps of the values above 0 in each of this block's segments, and calls
// on_largest(value) with the largest value of each lane's share of a segment. The group
// synchronises before the masses are read.
template <class T, int kSize, class Keep, class Largest>
__device__ inline void sum_segments(const Row<T, kSize>& row, const Work& w, const Keep& keep,
                                    const Largest& on_largest) {
  for (uint32_t s = static_cast<uint32_t>(row.rank) * kRowWarps + warp_index(); s < row.segments;
       s += static_cast<uint32_t>(row.ranks) * kRowWarps) {
    const uint32_t begin = s * row.tiles * kWarp + lane_index();
    double mass = 0;
    float largest = 0;
    for (uint32_t t = 0; t < row.tiles; t += kTiles) {
      Vec<T, kSize> in[kTiles];
#pragma unroll
      for (uint32_t j = 0; j < kTiles; ++j) in[j] = row.vector(begin + (t + j) * kWarp);
#pragma unroll
      for (uint32_t j = 0; j < kTiles; ++j) {
        if (begin + (t + j) * kWarp >= row.vectors) break;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float v = to_float(in[j].item[i]);
          if (v > 0 && keep(v)) mass += static_cast<double>(v);
          largest = v > largest ? v : largest;
        }
      }
    }
    mass = reduce_lanes<kWarp>(mass, Add{});
    if (lane_index() == 0) w.mass[static_cast<int>(s)] = mass;
    on_largest(largest);
  }
}

// The sum over all segments; after sum_segments and group_sync. Every thread holds it.
template <class T, int kSize>
__device__ inline double total_mass(const Row<T, kSize>& row, const Work& w) {
  const double total = reduce_block(row.mass(w, threadIdx.x), 0.0, Add{}, w.sums);
  __syncthreads();
  return total;
}

// Draws from what keep() keeps: the first index whose running mass exceeds `uniform` of the total.
// After sum_segments with the same keep() and group_sync. Thread 0 holds the token, -1 without
// mass.
template <class T, int kSize, class Keep>
__device__ inline int32_t draw(const Row<T, kSize>& row, const Work& w, const Keep& keep,
                               double uniform) {
  const double mass = row.mass(w, threadIdx.x);
  const double before = sum_before(mass, w.sums);
  if (threadIdx.x == row.segments - 1) w.number[0] = before + mass;
  __syncthreads();
  const double total = w.number[0];
  if (!(total > 0)) return -1;
  const double target = uniform * total;
  uint32_t segment = first_of(w, mass > 0 && before + mass > target, threadIdx.x);
  if (segment == kNone) {  // rounding, or an infinite mass: the last token
    segment = reduce_words(w, mass > 0 ? threadIdx.x : 0, 0, Max{});
  }
  if (threadIdx.x == segment) w.number[1] = before;
  __syncthreads();
  if (warp_index() != 0) return -1;
  double running = w.number[1];
  int32_t last = -1;  // kept so far
  const uint32_t begin = segment * row.tiles * kWarp + lane_index();
  for (uint32_t t = 0; t < row.tiles; ++t) {
    const uint32_t at = begin + t * kWarp;
    const Vec<T, kSize> in = row.vector(at);
    double value[kSize], sum = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float v = to_float(in.item[i]);
      value[i] = at < row.vectors && v > 0 && keep(v) ? static_cast<double>(v) : 0;
      sum += value[i];
    }
    const double inclusive = scan_lanes(sum);
    const double lanes_before = shuffle_up(inclusive, 1);
    double r = running + (lane_index() > 0 ? lanes_before : 0);
    uint32_t found = kNone;
    int32_t kept = -1;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (!(value[i] > 0)) continue;
      r += value[i];
      kept = static_cast<int32_t>(at * kSize + i);
      if (r > target && found == kNone) found = at * kSize + i;
    }
    found = reduce_lanes<kWarp>(found, Min{});
    if (found != kNone) return static_cast<int32_t>(found);
    kept = reduce_lanes<kWarp>(kept, Max{});
    last = kept > last ? kept : last;
    running += shuffle(inclusive, kWarp - 1);
  }
  return last;
}

}  // namespace opmux::gpu

#endif
