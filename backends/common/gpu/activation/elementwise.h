// SPDX-License-Identifier: Apache-2.0
// One thread per vector of the output, over all rows as one sequence: short rows fill blocks as
// well as long ones do.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

#include "rows.cuh"
#include "vec.cuh"

namespace opmux::gpu {

constexpr int kElementwiseThreads = 256;

// Op::read reads the kIn vectors that one vector of the output needs, Op::compute maps elements.
// On an H200 one vector a thread runs at copy speed; several a thread, or loads that are to leave
// the cache first, are up to 8 % slower.
template <class Op, int kIn, class T, int kSize>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise_kernel(RowsOf<2> rows, int64_t d, Divider width, uint32_t vectors) {
  wait_for_previous();
  let_next_start();
  const uint32_t vector = blockIdx.x * kElementwiseThreads + threadIdx.x;
  if (vector >= vectors) return;
  const Split at = width.split(vector);
  const int64_t column = static_cast<int64_t>(at.remainder) * kSize;
  Vec<T, kSize> in[kIn];
  Op::read(rows.template row<const T>(0, at.quotient) + column, d, in);
  float value[kIn][kSize], result[kSize];
#pragma unroll
  for (int k = 0; k < kIn; ++k) widen(in[k], value[k]);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if constexpr (kIn == 1) {
      result[i] = Op::compute(value[0][i]);
    } else {
      result[i] = Op::compute(value[0][i], value[1][i]);
    }
  }
  store(rows.template row<T>(1, at.quotient) + column, narrow<T>(result));
}

template <class Op, int kIn, class T, int kSize>
void launch_elementwise(const char* op, const Plane<2>& plane, int64_t d, Stream stream) {
  const int64_t width = d / kSize;
  for_pieces(plane, sizeof(T), width, [&](const RowsOf<2>& rows) {
    const int64_t vectors = rows.rows * width;
    launch({op, stream, ceil_div(vectors, kElementwiseThreads), kElementwiseThreads},
           elementwise_kernel<Op, kIn, T, kSize>, rows, d, Divider(width),
           static_cast<uint32_t>(vectors));
  });
}

template <class Op, int kIn>
void launch_elementwise(const char* op, const Plane<2>& plane, int64_t d, FloatType type,
                        Stream stream) {
  for_float_type(type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if (d % kFull<T> == 0 && aligned_rows(plane, sizeof(T), kVectorBytes)) {
      launch_elementwise<Op, kIn, T, kFull<T>>(op, plane, d, stream);
    } else {
      launch_elementwise<Op, kIn, T, 1>(op, plane, d, stream);
    }
  });
}

}  // namespace opmux::gpu

#endif
