// SPDX-License-Identifier: Apache-2.0
// What the sums over a token's experts share: out[t] = scale * sum over j of a row of x, either
// x[t, j] or, weighed, x[permutation[t, j]].
#pragma once

#include "indices.h"

#if OPMUX_KERNEL
#include "rows.cuh"
#include "vec.cuh"
#endif

namespace opmux::gpu {

struct RowSum {
  const void* x;
  void* out;  // (tokens, width)
  int64_t token_stride;
  int64_t row_stride;
  int64_t out_stride;
  int64_t tokens;
  int64_t width;
  int topk;
  float scale;
  FloatType type;
  // with a permutation
  Indices permutation = {};
  const float* factors = nullptr;  // nullptr: all 1
  int64_t permutation_stride = 0;
  int64_t factors_stride = 0;
  int64_t source_rows = 0;
};

#if OPMUX_KERNEL

constexpr int kRowSumThreads = 256;

// A thread a vector of the result. It has kBatch rows on their way at a time.
template <class T, int kSize, int kBatch, bool kPermuted>
__global__ void __launch_bounds__(kRowSumThreads)
    row_sum_kernel(RowSum a, Divider width, int64_t first_token, uint32_t vectors) {
  wait_for_previous();
  let_next_start();
  const uint32_t vector = blockIdx.x * kRowSumThreads + threadIdx.x;
  if (vector >= vectors) return;
  const Split at = width.split(vector);
  const int64_t token = first_token + at.quotient;
  const int64_t column = static_cast<int64_t>(at.remainder) * kSize;
  const T* x = static_cast<const T*>(a.x) + column;
  float sum[kSize] = {};
  for (int j = 0; j < a.topk; j += kBatch) {
    Vec<T, kSize> in[kBatch] = {};
    float factor[kBatch];
    bool counts[kBatch];
    if constexpr (kPermuted) {
      int64_t row[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        row[b] = a.permutation.at(token * a.permutation_stride + j + b);
        factor[b] = a.factors == nullptr ? 1.0f : a.factors[token * a.factors_stride + j + b];
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        counts[b] = row[b] >= 0 && row[b] < a.source_rows;
        if (counts[b]) in[b] = load<kSize>(x + row[b] * a.row_stride);
      }
    } else {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        in[b] = load<kSize>(x + token * a.token_stride + (j + b) * a.row_stride);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      float value[kSize];
      if (kPermuted && !counts[b]) continue;
      widen(in[b], value);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum[i] += kPermuted ? value[i] * factor[b] : value[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum[i] *= a.scale;
  T* out = static_cast<T*>(a.out) + token * a.out_stride + column;
  // On an H200 stores that leave the caches first save 3 % beside rows in order, and cost 5 %
  // beside rows in disorder. Loads are best without a hint.
  if constexpr (kPermuted) {
    store(out, narrow<T>(sum));
  } else {
    store_streaming(out, narrow<T>(sum));
  }
}

template <class T, int kSize, int kBatch, bool kPermuted>
void launch_row_sum(const char* op, const RowSum& a, Stream stream) {
  const int64_t width = a.width / kSize;
  const int64_t most = ((int64_t{1} << 31) - 1) / width;  // tokens that 31 bits can count
  for (int64_t first = 0; first < a.tokens; first += most) {
    const int64_t tokens = a.tokens - first < most ? a.tokens - first : most;
    launch({op, stream, ceil_div(tokens * width, kRowSumThreads), kRowSumThreads},
           row_sum_kernel<T, kSize, kBatch, kPermuted>, a, Divider(width), first,
           static_cast<uint32_t>(tokens * width));
  }
}

template <bool kPermuted>
void launch_row_sum(const char* op, const RowSum& a, Stream stream) {
  for_float_type(a.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kSize = kFull<T>;
    const uint64_t all =
        static_cast<uint64_t>(a.width) | a.token_stride | a.row_stride | a.out_stride;
    const uintptr_t data = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.out);
    if (all % kSize != 0 || data % kVectorBytes != 0) {
      return launch_row_sum<T, 1, 1, kPermuted>(op, a, stream);
    }
    if (a.topk % 8 == 0) return launch_row_sum<T, kSize, 8, kPermuted>(op, a, stream);
    if (a.topk % 6 == 0) return launch_row_sum<T, kSize, 6, kPermuted>(op, a, stream);
    if (a.topk % 4 == 0) return launch_row_sum<T, kSize, 4, kPermuted>(op, a, stream);
    if (a.topk % 3 == 0) return launch_row_sum<T, kSize, 3, kPermuted>(op, a, stream);
    if (a.topk % 2 == 0) return launch_row_sum<T, kSize, 2, kPermuted>(op, a, stream);
    launch_row_sum<T, kSize, 1, kPermuted>(op, a, stream);
  });
}

#else

// Of x[t, j]. A stride of a dimension of one element counts for nothing and may be odd.
inline RowSum row_sum_of(const char* op, const Tensor& x, double scale, const Tensor& out) {
  check_same_device(op, x, out);
  check_same_dtype(op, x, out);
  const FloatType type = float_type(op, x);
  check(x.dim() == 3 && out.dim() == 2, op, "x must be (tokens, topk, h), out (tokens, h)");
  check(out.size(0) == x.size(0) && out.size(1) == x.size(2), op, "out must be (tokens, h)");
  check_last_dim_contiguous(op, x);
  check_last_dim_contiguous(op, out);
  check_row(op, x.size(2));
  check(x.size(1) < kMaxRow, op, "topk must be below 2**31");
  return {x.const_data_ptr(),
          out.mutable_data_ptr(),
          x.size(0) > 1 ? x.stride(0) : 0,
          x.size(1) > 1 ? x.stride(1) : 0,
          out.size(0) > 1 ? out.stride(0) : 0,
          x.size(0),
          x.size(2),
          static_cast<int>(x.size(1)),
          static_cast<float>(scale),
          type};
}

#endif

}  // namespace opmux::gpu
