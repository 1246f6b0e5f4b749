// SPDX-License-Identifier: Apache-2.0
// What the RMS norms share: x / sqrt(mean(x^2) + eps) * weight. A row is read twice, the second
// time from the cache.
#pragma once

#include "elementwise.h"

namespace opmux::cpu {
namespace {

struct NormRows {
  const void* x;
  int64_t x_stride;
  void* out;
  int64_t out_stride;
  const void* weight;
  int64_t width;
  int64_t rows;
  float eps;
  bool stream;  // out does not fit the caches
};
using NormKernel = void(const NormRows&);

// In place: residual = x + residual, x = norm(x + residual).
struct AddNormRows {
  void* x;
  int64_t x_stride;
  void* residual;
  int64_t residual_stride;
  const void* weight;
  int64_t width;
  int64_t rows;
  float eps;
};
using AddNormKernel = void(const AddNormRows&);

#if OPMUX_KERNEL

OPMUX_INLINE Vec plain_weight(Vec w) { return w; }
OPMUX_INLINE Vec gemma_weight(Vec w) { return 1.0f + w; }

OPMUX_INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
OPMUX_INLINE void add_square(Pair* sum, Pair v) {
  *sum = {fma(v.a, v.a, sum->a), fma(v.b, v.b, sum->b)};
}

// 1 / sqrt(mean(v^2) + eps) of the row whose pieces row(i, count) gives.
template <class F>
OPMUX_INLINE float inverse_rms(int64_t width, float eps, const F& row) {
  Pair even = {}, odd = {};  // two pairs of sums: a single one would wait for itself
  int64_t i = 0;
  for (; i + 2 * kPair <= width; i += 2 * kPair) {
    add_square(&even, row(i, Full{}));
    add_square(&odd, row(i + kPair, Full{}));
  }
  for_pairs(i, width, [&](int64_t j, auto count) { add_square(&even, row(j, count)); });
  const Pair sum = even + odd;
  return 1.0f / __builtin_sqrtf(reduce_add(sum.a + sum.b) / static_cast<float>(width) + eps);
}

// The second pass reads from the cache, so memory would idle but for the next row: 23 -> 31 GB/s
// for rmsnorm from memory, bfloat16, a Zen 5 core.
template <class T>
OPMUX_INLINE Ahead<T> row_ahead(const T* row, int64_t stride, bool has_next) {
  return {row, has_next ? row + stride : row};
}

template <class T, class F>
OPMUX_INLINE void norm_rows(const NormRows& a, const F& weigh) {
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    T* out = static_cast<T*>(a.out) + r * a.out_stride;
    const float scale =
        inverse_rms(a.width, a.eps, [&](int64_t i, auto count) { return load_pair(x + i, count); });
    const auto norm = [&](Vec v, Vec w) { return v * scale * weigh(w); };
    map_row(a.stream, a.width, out, norm, row_ahead(x, a.x_stride, r + 1 < a.rows), weight);
  }
  if (a.stream) stream_fence();
}

template <class T, class F>
OPMUX_INLINE void add_norm_rows(const AddNormRows& a, const F& weigh) {
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t r = 0; r < a.rows; ++r) {
    T* x = static_cast<T*>(a.x) + r * a.x_stride;
    T* residual = static_cast<T*>(a.residual) + r * a.residual_stride;
    const Ahead<T> x_ahead = row_ahead<T>(x, a.x_stride, r + 1 < a.rows);
    const Ahead<T> residual_ahead = row_ahead<T>(residual, a.residual_stride, r + 1 < a.rows);
    // Summed twice rather than kept: the norm takes the sum before it is rounded.
    const float scale = inverse_rms(a.width, a.eps, [&](int64_t i, auto count) {
      return load_pair(x + i, count) + load_pair(residual + i, count);
    });
    for_pairs(0, a.width, [&](int64_t i, auto count) {
      const Pair s = load_pair(x_ahead + i, count) + load_pair(residual_ahead + i, count);
      const auto norm = [&](Vec v, Vec w) { return v * scale * weigh(w); };
      store_pair(residual + i, s, count);
      store_pair(x + i, apply(norm, s, load_pair(weight + i, count)), count);
    });
  }
}

#else

inline void check_weight(const char* op, const Tensor& weight, int64_t width) {
  check(weight.dim() == 1 && weight.size(0) == width, op,
        "weight must have one element per column");
  check_last_dim_contiguous(op, weight);
}

inline void launch_norm(const char* op, const FloatKernels<NormKernel>& kernels, const Tensor& x,
                        const Tensor& weight, double eps, const Tensor& out) {
  check_same_device(op, x, weight, out);
  check_same_dtype(op, x, weight, out);
  check_same_shape(op, x, out);
  NormKernel* kernel = kernels.get(float_type(op, x));
  const Rows<2> rows(op, {reads(x), writes(out)});
  const int64_t width = rows.width(0);
  check_weight(op, weight, width);
  const void* weights = weight.const_data_ptr();
  const int64_t row_bytes = 2 * width * static_cast<int64_t>(x.element_size());
  const bool stream = streams(rows.size() * row_bytes);
  parallel_rows(rows, row_bytes, [&](const RowSpan<2>& s) {
    kernel({s.data[0], s.stride[0], s.data[1], s.stride[1], weights, width, s.rows,
            static_cast<float>(eps), stream});
  });
}

inline void launch_add_norm(const char* op, const FloatKernels<AddNormKernel>& kernels,
                            const Tensor& x, const Tensor& residual, const Tensor& weight,
                            double eps) {
  check_same_device(op, x, residual, weight);
  check_same_dtype(op, x, residual, weight);
  check_same_shape(op, x, residual);
  AddNormKernel* kernel = kernels.get(float_type(op, x));
  const Rows<2> rows(op, {writes(x), writes(residual)});
  const int64_t width = rows.width(0);
  check_weight(op, weight, width);
  const void* weights = weight.const_data_ptr();
  const int64_t row_bytes = 4 * width * static_cast<int64_t>(x.element_size());
  parallel_rows(rows, row_bytes, [&](const RowSpan<2>& s) {
    kernel({s.data[0], s.stride[0], s.data[1], s.stride[1], weights, width, s.rows,
            static_cast<float>(eps)});
  });
}

#endif

}  // namespace
}  // namespace opmux::cpu
