// SPDX-License-Identifier: Apache-2.0
// Where the rows of a Plane lie, and the division that finds the row of an element.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

namespace opmux::gpu {

struct Split {
  uint32_t quotient;
  uint32_t remainder;
};

// Division of numbers below 2^31 by one that the host knows: a multiplication, where the
// hardware's division takes some dozens of instructions.
struct Divider {
  uint32_t divisor;
  uint32_t factor;
  uint32_t shift;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)), factor(0), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    // ceil(2^(32 + shift) / divisor) - 2^32
    factor = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ Split split(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> 32);
    const uint32_t quotient = (high + n) >> shift;
    return {quotient, n - quotient * divisor};
  }
};

// A Plane of fewer than 2^31 rows, as kernels take it.
template <size_t N>
struct RowsOf {
  void* data[N];
  int64_t inner_stride[N];
  int64_t outer_stride[N];
  Divider inner;
  uint32_t rows;
  bool nested;

  RowsOf() = default;
  explicit RowsOf(const Plane<N>& plane)
      : inner(plane.inner_rows),
        rows(static_cast<uint32_t>(plane.rows)),
        nested(plane.rows > plane.inner_rows) {
    for (size_t k = 0; k < N; ++k) {
      data[k] = plane.data[k];
      inner_stride[k] = plane.inner_stride[k];
      outer_stride[k] = plane.outer_stride[k];
    }
  }

  // The start of a row of operand k.
  template <class T>
  __device__ T* row(int k, uint32_t r) const {
    T* base = static_cast<T*>(data[k]);
    if (!nested) return base + static_cast<int64_t>(r) * inner_stride[k];
    const Split at = inner.split(r);
    return base + static_cast<int64_t>(at.quotient) * outer_stride[k] +
           static_cast<int64_t>(at.remainder) * inner_stride[k];
  }
};

// Cuts a plane into pieces that kernels can count in 31 bits: of at most 2^31 / per_row rows, where
// a row counts per_row items. Calls f(RowsOf<N>).
template <size_t N, class F>
void for_pieces(const Plane<N>& plane, int item_bytes, int64_t per_row, const F& f) {
  const int64_t limit = ((int64_t{1} << 31) - 1) / per_row;
  if (plane.rows <= limit) return f(RowsOf<N>(plane));
  const int64_t inner_step = plane.inner_rows <= limit ? plane.inner_rows : limit;
  const int64_t outer_rows = plane.rows / plane.inner_rows;
  const int64_t outer_step = limit / inner_step;
  for (int64_t outer = 0; outer < outer_rows; outer += outer_step) {
    for (int64_t inner = 0; inner < plane.inner_rows; inner += inner_step) {
      Plane<N> piece = plane;
      for (size_t k = 0; k < N; ++k) {
        const int64_t offset = outer * plane.outer_stride[k] + inner * plane.inner_stride[k];
        piece.data[k] = static_cast<char*>(plane.data[k]) + offset * item_bytes;
      }
      const int64_t left = plane.inner_rows - inner, outer_left = outer_rows - outer;
      piece.inner_rows = left < inner_step ? left : inner_step;
      piece.rows = piece.inner_rows * (outer_left < outer_step ? outer_left : outer_step);
      f(RowsOf<N>(piece));
    }
  }
}

}  // namespace opmux::gpu

#endif
