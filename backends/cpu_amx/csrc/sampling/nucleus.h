// SPDX-License-Identifier: Apache-2.0
// The top-p threshold of a row.
#pragma once

#include "sampling/filter.h"

#if OPMUX_KERNEL
namespace opmux::cpu {
namespace {

// Sorts ascending by digits of 11 bits; the result lies in the array that is returned.
inline uint32_t* sort_keys(uint32_t* keys, uint32_t* spare, int64_t size, uint64_t* start) {
  for (int shift = 0; shift < 32; shift += 11) {
    __builtin_memset(start, 0, sizeof(uint64_t) * kBuckets);
    for (int64_t i = 0; i < size; ++i) ++start[keys[i] >> shift & (kBuckets - 1)];
    uint64_t next = 0;
    for (int b = 0; b < kBuckets; ++b) {
      const uint64_t count = start[b];
      start[b] = next;
      next += count;
    }
    for (int64_t i = 0; i < size; ++i) {
      spare[start[keys[i] >> shift & (kBuckets - 1)]++] = keys[i];
    }
    uint32_t* sorted = spare;
    spare = keys;
    keys = sorted;
  }
  return keys;
}

// Adds the masses one by one from the largest down, the order in which the definition does: where
// a running sum meets p but for rounding, only the same roundings give the same answer. Overwrites
// the row's keys.
inline Cut keep_top_p_in_order(const Row& row, double p, const Cut& within) {
  const uint32_t low = within.key > 0 ? within.key : 1;
  const int64_t size = gather(row.keys, row.size, low, UINT32_MAX, row.keys);
  const uint32_t* keys = sort_keys(row.keys, row.spare, size, row.work->bins);
  double total = 0;
  for (int64_t i = size - 1; i >= 0; --i) total += static_cast<double>(as_float(keys[i]));
  const double target = p * total;
  Cut cut = {0, 0, 0};
  for (int64_t i = size - 1; i >= 0; --i) {
    if (i < size - 1 && cut.mass >= target && keys[i] != cut.key) break;
    if (keys[i] != cut.key) cut.above = cut.mass;
    cut.key = keys[i];
    cut.mass += static_cast<double>(as_float(keys[i]));
  }
  return cut;
}

// Among what `within` keeps.
inline Cut keep_top_p(const Row& row, double p, const Cut& within) {
  if (p >= 1) return within;
  if (!(p > 0)) return find(row, [](uint64_t count, double) { return count > 0; });
  const double target = p * within.mass;
  const Cut cut = find(row, [target](uint64_t, double mass) { return mass >= target; });
  // more than any order of additions can differ by
  const double slack = static_cast<double>(4 * row.size + 2 * kBuckets) * 0x1p-53;
  const bool below = cut.above * (1 + slack) < target * (1 - slack);
  const bool reached = cut.mass * (1 - slack) >= target * (1 + slack);
  return below && reached ? cut : keep_top_p_in_order(row, p, within);
}

}  // namespace
}  // namespace opmux::cpu
#endif
