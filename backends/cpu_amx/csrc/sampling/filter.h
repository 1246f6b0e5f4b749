// SPDX-License-Identifier: Apache-2.0
// Which probabilities of a row stay, without sorting it: a radix search. The bits of non-negative
// floats are ordered like their values, so they serve as keys. One pass counts the keys by their
// upper 11 bits, exponent and three bits of the fraction, and adds up their fractions as integers:
// every bucket then has its exact count and exact mass. A walk from the top finds the bucket where
// the k-th key or the mass p is reached; the keys in it are gathered and searched by their next 11
// and last 9 bits. No threshold depends on the order of additions beyond the buckets.
#pragma once

#include "kernel.h"

namespace opmux::cpu {
namespace {

constexpr int kBuckets = 1 << 11;
constexpr int kCopies = 4;      // of the counters: neighbours often fall into one bucket
constexpr int64_t kSlack = 16;  // a gathering store writes a whole register

// What a row's keys have in each bucket.
struct Level {
  uint64_t count[kBuckets];
  uint64_t fraction[kBuckets];  // sum of the fraction bits
};

// Scratch memory of one task; two arrays of `size` keys follow it.
struct alignas(64) Workspace {
  uint64_t bins[kBuckets * kCopies];
  Level first, deeper;
};
inline int64_t workspace_bytes(int64_t size) {
  const int64_t bytes = static_cast<int64_t>(sizeof(Workspace)) + 2 * 4 * (size + kSlack);
  return (bytes + 63) / 64 * 64;
}

#if OPMUX_KERNEL

constexpr int kFractionBits = 23;
constexpr uint32_t kFraction = (1u << kFractionBits) - 1;

// A threshold: keys >= key stay, whose mass is `mass`; those above it have `above`.
struct Cut {
  uint32_t key;
  double above, mass;
};

inline float as_float(uint32_t key) {
  float value;
  __builtin_memcpy(&value, &key, sizeof value);
  return value;
}

// The sum of `count` values with the exponent of `key`. Exact below 2^29 values.
inline double bucket_mass(uint32_t key, uint64_t count, uint64_t fraction) {
  const uint64_t exponent = key >> kFractionBits;
  if (exponent == 255) return __builtin_inf();
  if (exponent > 0) fraction += count << kFractionBits;
  const uint64_t scale_bits = ((exponent > 0 ? exponent : 1) + (1023 - 127 - 23)) << 52;
  double scale;
  __builtin_memcpy(&scale, &scale_bits, sizeof scale);
  return static_cast<double>(fraction) * scale;
}

// Adds keys to a level; a counter holds count and fractions of at most 2^20 keys.
template <int kUsed>
inline void add_keys(const uint32_t* keys, int size, int shift, uint64_t* bins, Level* level) {
  constexpr int kCountShift = kFractionBits + 20;
  constexpr uint64_t kOne = uint64_t{1} << kCountShift;
  __builtin_memset(bins, 0, sizeof(uint64_t) * kBuckets * kUsed);
  const auto add = [&](uint32_t key, int copy) {
    bins[(key >> shift & (kBuckets - 1)) * kUsed + copy] += kOne + (key & kFraction);
  };
  int i = 0;
  for (; i + kUsed <= size; i += kUsed) {
    for (int copy = 0; copy < kUsed; ++copy) add(keys[i + copy], copy);
  }
  for (; i < size; ++i) add(keys[i], 0);
  for (int b = 0; b < kBuckets; ++b) {
    for (int copy = 0; copy < kUsed; ++copy) {
      level->count[b] += bins[b * kUsed + copy] >> kCountShift;
      level->fraction[b] += bins[b * kUsed + copy] & (kOne - 1);
    }
  }
}

inline void count_keys(const uint32_t* keys, int64_t size, int shift, uint64_t* bins,
                       Level* level) {
  constexpr int kMost = 1 << 20, kFew = 1 << 13;
  __builtin_memset(level, 0, sizeof *level);
  while (size > 0) {
    const int some = size < kMost ? static_cast<int>(size) : kMost;
    if (some > kFew) {
      add_keys<kCopies>(keys, some, shift, bins, level);
    } else {  // clearing and merging copies would cost more than it saves
      add_keys<1>(keys, some, shift, bins, level);
    }
    keys += some;
    size -= some;
  }
}

// Copies the keys in [low, high] to `to`, which may be `keys`; returns how many.
inline int64_t gather(const uint32_t* keys, int64_t size, uint32_t low, uint32_t high,
                      uint32_t* to) {
  int64_t found = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= size; i += kLanes) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 in =
        _mm512_cmple_epu32_mask(_mm512_sub_epi32(key, _mm512_set1_epi32(static_cast<int>(low))),
                                _mm512_set1_epi32(static_cast<int>(high - low)));
    _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(in, key));
    found += __builtin_popcount(in);
  }
#endif
  for (; i < size; ++i) {
    const uint32_t key = keys[i];
    to[found] = key;
    found += key - low <= high - low;
  }
  return found;
}

// A row, ready for searches.
struct Row {
  uint32_t* keys;
  uint32_t* spare;
  int64_t size;
  Workspace* work;
  Cut all;  // the threshold that keeps everything
};

template <class T>
inline Row read_row(const T* probs, int64_t size, void* scratch) {
  Workspace* work = static_cast<Workspace*>(scratch);
  uint32_t* keys = reinterpret_cast<uint32_t*>(work + 1);
  // max() gives its second operand where the first is NaN, or where both are zero
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store(reinterpret_cast<float*>(keys) + i, max(load(probs + i), Vec{}));
  }
  const int tail = static_cast<int>(size - i);
  store(reinterpret_cast<float*>(keys) + i, max(load(probs + i, tail), Vec{}), tail);
  count_keys(keys, size, 20, work->bins, &work->first);
  Row row = {keys, keys + size + kSlack, size, work, {}};
  for (int b = kBuckets - 1; b >= 0; --b) {
    if (work->first.count[b] == 0) continue;
    row.all.mass +=
        bucket_mass(static_cast<uint32_t>(b) << 20, work->first.count[b], work->first.fraction[b]);
  }
  return row;
}

// The largest key for which reached(count, mass) of all keys >= it holds; the smallest if none.
template <class Reached>
inline Cut find(const Row& row, const Reached& reached) {
  const Level* level = &row.work->first;
  const uint32_t* keys = row.keys;
  int64_t size = row.size;
  uint32_t key = 0;
  uint64_t count = 0;
  double above = 0;
  for (int shift = 20;; shift = shift == 20 ? 9 : 0) {
    uint64_t bucket_count = 0;
    double mass = 0;
    uint32_t low = key;
    for (int b = kBuckets - 1; b >= 0; --b) {
      if (level->count[b] == 0) continue;
      count += bucket_count;
      above += mass;
      low = key | static_cast<uint32_t>(b) << shift;
      bucket_count = level->count[b];
      mass = bucket_mass(low, bucket_count, level->fraction[b]);
      if (reached(count + bucket_count, above + mass)) break;
    }
    key = low;
    if (shift == 0) return {key, above, above + mass};
    size = gather(keys, size, key, key + ((1u << shift) - 1), row.spare);
    keys = row.spare;
    level = &row.work->deeper;
    count_keys(keys, size, shift == 20 ? 9 : 0, row.work->bins, &row.work->deeper);
  }
}

inline Cut keep_top_k(const Row& row, int64_t k) {
  if (k < 1 || k >= row.size) return row.all;
  return find(row, [k](uint64_t count, double) { return count >= static_cast<uint64_t>(k); });
}

#endif

}  // namespace
}  // namespace opmux::cpu
