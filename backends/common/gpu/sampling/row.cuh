// SPDX-License-Identifier: Apache-2.0
// A row of probabilities, the group of blocks that works on it, and a draw from it.
//
// Masses are sums in float64 over *segments*, whose bounds and whose order of additions follow from
// the length of the row alone: a row gives the same token whether one block works on it or eight.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

#include <type_traits>

#include "reduce.cuh"
#include "sampling/filter.h"
#include "vec.cuh"

namespace opmux::gpu {

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kMaxRanks = 8;  // blocks of a group
constexpr int kSegments = 128;
constexpr int kBuckets = kRowThreads;
constexpr int kCopies = 4;            // of the histogram, so that fewer lanes meet in a bucket
constexpr int kFound = 3072;          // candidates that a block can note
constexpr int kSorted = kRowThreads;  // and that one can sort
constexpr uint32_t kNone = 0xffffffff;

// The bits of floats that are not negative are ordered like their values.
__device__ inline uint32_t key_of(float v) { return float_as_bits(v); }
__device__ inline float mass_of(float v) { return v > 0 ? v : 0; }  // NaN: 0

// Shared memory of a block.
struct Work {
  Shared<uint32_t, kBuckets * kCopies>& copies;
  Shared<uint32_t, kBuckets>& histogram;  // sums of the copies, and for itself
  Shared<uint32_t, kFound>& found_key;    // what this block found
  Shared<uint32_t, kFound>& found_place;
  Shared<uint64_t, kSorted>& pair;  // some of what all found
  Shared<uint64_t, kSorted>& sorted;
  Shared<double, 2 * kSegments>& mass;    // of this block's segments, twice
  Shared<uint32_t, 2 * kSegments>& more;  // and what comes to it, in halves of mantissas
  Shared<double, kMaxWarps>& sums;        // scratch of reductions
  Shared<uint32_t, kMaxWarps>& counts;
  Shared<double, 4>& given;          // to the other blocks, in turn
  Shared<uint32_t, 4>& given_words;  // how many found, largest and smallest
  Shared<double, 2>& number;         // to the block's other threads
  Shared<uint32_t, 2>& word;
};

#define OPMUX_ROW_WORK(work)                                                                \
  __shared__ Shared<uint32_t, kBuckets * kCopies> work##_copies;                            \
  __shared__ Shared<uint32_t, kBuckets> work##_histogram;                                   \
  __shared__ Shared<uint32_t, kFound> work##_found_key;                                     \
  __shared__ Shared<uint32_t, kFound> work##_found_place;                                   \
  __shared__ Shared<uint64_t, kSorted> work##_pair;                                         \
  __shared__ Shared<uint64_t, kSorted> work##_sorted;                                       \
  __shared__ Shared<double, 2 * kSegments> work##_mass;                                     \
  __shared__ Shared<uint32_t, 2 * kSegments> work##_more;                                   \
  __shared__ Shared<double, kMaxWarps> work##_sums;                                         \
  __shared__ Shared<uint32_t, kMaxWarps> work##_counts;                                     \
  __shared__ Shared<double, 4> work##_given;                                                \
  __shared__ Shared<uint32_t, 4> work##_given_words;                                        \
  __shared__ Shared<double, 2> work##_number;                                               \
  __shared__ Shared<uint32_t, 2> work##_word;                                               \
  const Work work = {work##_copies, work##_histogram, work##_found_key, work##_found_place, \
                     work##_pair,   work##_sorted,    work##_mass,      work##_more,        \
                     work##_sums,   work##_counts,    work##_given,     work##_given_words, \
                     work##_number, work##_word}

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

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

// The blocks of a row. Numbers change hands in two places by turns: a block that gives the next is
// past a barrier that every reader of the last but one has reached.
struct Ranks {
  int rank = group_rank();
  int size = group_size();
  int turn = 0;

  // Element i of the array of the block whose rank is this thread's lane; 0 in other lanes.
  template <class T, int kSize>
  __device__ T read(Shared<T, kSize>& array, int i) const {
    return lane_index() < size ? group_read(array, lane_index(), i) : T{};
  }
};

// The sum over all threads of the group, which all hold. For guesses: its order depends on the
// number of blocks.
__device__ inline double sum_group(Ranks& ranks, const Work& w, double own) {
  own = reduce_block(own, 0.0, Add{}, w.sums);
  ranks.turn ^= 1;
  if (threadIdx.x == 0) w.given[ranks.turn] = own;
  group_sync();
  return reduce_lanes<kWarp>(ranks.read(w.given, ranks.turn), Add{});
}

// The row of this block's group, in vectors of kSize.
template <class T, int kSize>
struct Row {
  using Part = Vec<T, kSize>;
  static constexpr int kItems = kSize;
  static constexpr uint32_t kGrain =  // that keys are multiples of
      sizeof(T) == 4                ? 1
      : std::is_same_v<T, bfloat16> ? 1u << 16
                                    : 1u << 13;
  // Vectors that a lane has on their way: what is done with more takes too many registers.
  static constexpr uint32_t kBatch = kSize > 4 ? 2 : kSize > 1 ? 4 : 8;
  const T* data;
  uint32_t vectors;
  uint32_t steps;  // vectors of each lane in a segment
  uint32_t begin;  // this warp's first segment
  uint32_t count;  // and how many it has

  __device__ Row(const Probs& probs, uint32_t row, const Ranks& ranks)
      : data(static_cast<const T*>(probs.data) + static_cast<int64_t>(row) * probs.stride),
        vectors(static_cast<uint32_t>(probs.size / kSize)),
        steps((vectors + kSegments * kWarp - 1) / (kSegments * kWarp)),
        count(static_cast<uint32_t>(kSegments / (ranks.size * kRowWarps))) {
    begin = static_cast<uint32_t>(ranks.rank * kRowWarps + warp_index()) * count;
  }

  __device__ int owner(uint32_t segment) const {
    return static_cast<int>(segment / (count * kRowWarps));
  }
  __device__ uint32_t segment_of(uint32_t index) const { return index / (steps * kWarp * kSize); }
  __device__ uint32_t place(uint32_t segment, uint32_t step) const {
    return (segment * steps + step) * kWarp + static_cast<uint32_t>(lane_index());
  }
  // Zeros behind the end: they have no mass.
  __device__ Part fetch(uint32_t at) const {
    Part part = {};
    if (at < vectors) part = load<kSize>(data + static_cast<int64_t>(at) * kSize);
    return part;
  }

  // Calls f(vector, its place) for this lane's vectors of a segment, in their order.
  template <class F>
  __device__ void for_vectors(uint32_t segment, const F& f) const {
    for (uint32_t i = 0; i < steps; i += kBatch) {
      Part part[kBatch] = {};
#pragma unroll
      for (uint32_t j = 0; j < kBatch; ++j) {
        if (i + j < steps) part[j] = fetch(place(segment, i + j));
      }
#pragma unroll
      for (uint32_t j = 0; j < kBatch; ++j) {
        if (i + j < steps) f(part[j], place(segment, i + j));
      }
    }
  }
  // Calls f(value, index), and after each segment end(segment); values not above 0 are 0.
  template <class F, class End>
  __device__ void for_each(const F& f, const End& end) const {
    for (uint32_t s = begin; s < begin + count; ++s) {
      for_vectors(s, [&](const Part& part, uint32_t at) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          f(mass_of(to_float(part.item[i])), at * kSize + static_cast<uint32_t>(i));
        }
      });
      end(s);
    }
  }
};

// Sums what weight(value, index) gives over each of this block's segments into half `half` of
// w.mass. The group synchronises between the last reading of the half and this, and before the
// next.
template <class Row, class Weight>
__device__ inline void sum_segments(const Row& row, const Work& w, int half, const Weight& weight) {
  double own = 0;
  row.for_each([&](float v, uint32_t index) { own += weight(v, index); },
               [&](uint32_t segment) {
                 own = reduce_lanes<kWarp>(own, Add{});
                 if (lane_index() == 0) w.mass[half * kSegments + static_cast<int>(segment)] = own;
                 own = 0;
               });
}

// The mass of the segment that has this thread's number, 0 behind the last; after group_sync.
template <class Row>
__device__ inline double segment_mass(const Row& row, const Work& w, int half) {
  const uint32_t segment = threadIdx.x;
  if (segment >= kSegments) return 0;
  return group_read(w.mass, row.owner(segment), half * kSegments + static_cast<int>(segment));
}
// Over all segments.
__device__ inline double total_of(const Work& w, double segment) {
  const double total = reduce_block(segment, 0.0, Add{}, w.sums);
  __syncthreads();
  return total;
}

// Of the parts that the lanes of a warp hold, in order, the one in which the running mass exceeds
// the target; `before` is the mass before the first part, then before that one. Where rounding, or
// an infinite mass, leaves nothing above the target: the last that has mass, which one must have.
__device__ inline int part_with(double mass, double target, double* before) {
  const double through = scan_lanes(mass);
  const double lanes_before = shuffle_up(through, 1);
  const double own = *before + (lane_index() > 0 ? lanes_before : 0);
  const uint32_t lane = static_cast<uint32_t>(lane_index());
  const bool exceeds = mass > 0 && own + mass > target;
  uint32_t found = reduce_lanes<kWarp>(exceeds ? lane : kNone, Min{});
  const uint32_t last = reduce_lanes<kWarp>(mass > 0 ? lane : 0, Max{});
  found = found != kNone ? found : last;
  *before = shuffle(own, static_cast<int>(found));
  return static_cast<int>(found);
}

// Draws from what keep(value) keeps: the first index whose running mass exceeds `uniform` of the
// total, -1 without mass. `mass` is what segment_mass() gives. One thread of the group writes it.
template <class Row, class Keep>
__device__ inline void draw(const Row& row, const Ranks& ranks, const Work& w, double mass,
                            const Keep& keep, double uniform, int32_t* token) {
  const double before_own = sum_before(mass, w.sums);
  if (threadIdx.x == kSegments - 1) w.number[0] = before_own + mass;
  __syncthreads();
  const double total = w.number[0];
  if (!(total > 0)) {
    if (ranks.rank == 0 && threadIdx.x == 0) *token = -1;
    return;
  }
  const double target = uniform * total;
  uint32_t segment = first_of(w, mass > 0 && before_own + mass > target, threadIdx.x);
  if (segment == kNone) {  // rounding, or an infinite mass: the last one with mass
    segment = reduce_words(w, mass > 0 ? threadIdx.x : 0, 0, Max{});
  }
  if (threadIdx.x == segment) w.number[1] = before_own;
  __syncthreads();
  if (segment < row.begin || segment >= row.begin + row.count) return;
  double before = w.number[1], running = before;
  typename Row::Part chosen = {};
  uint32_t place = 0;
  bool found = false;
  const auto kept = [&](const auto& item) {
    const float v = mass_of(to_float(item));
    return keep(v) ? static_cast<double>(v) : 0.0;
  };
  row.for_vectors(segment, [&](const typename Row::Part& part, uint32_t at) {
    double sum = 0;
#pragma unroll
    for (int k = 0; k < Row::kItems; ++k) sum += kept(part.item[k]);
    sum = reduce_lanes<kWarp>(sum, Add{});
    if (!found && sum > 0) {
      chosen = part;
      place = at;
      before = running;
    }
    running += sum;
    found |= sum > 0 && running > target;
  });
  double sum = 0;
#pragma unroll
  for (int k = 0; k < Row::kItems; ++k) sum += kept(chosen.item[k]);
  if (part_with(sum, target, &before) != lane_index()) return;
  int item = 0;
#pragma unroll
  for (int k = 0; k < Row::kItems; ++k) {
    const double own = kept(chosen.item[k]);
    if (!(own > 0) || before > target) continue;
    before += own;
    item = k;
  }
  *token = static_cast<int32_t>(place * Row::kItems) + item;
}

}  // namespace opmux::gpu

#endif
