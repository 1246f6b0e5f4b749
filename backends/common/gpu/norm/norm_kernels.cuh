// SPDX-License-Identifier: Apache-2.0
// The kernels of the RMS norms. Which one runs, and in which order it adds, depends on the width of
// a row alone, so that a row's result does not depend on how many rows there are:
//   up to 128 vectors   lanes of a warp share a row, several rows a block
//   up to 2048          a block a row, kept in registers between the two steps
//   more, or unaligned  a block a row, read twice
#pragma once

#include "norm/rmsnorm.h"

#if OPMUX_KERNEL

#include "reduce.cuh"
#include "rows.cuh"
#include "vec.cuh"

namespace opmux::gpu {

struct NormArgs {
  RowsOf<2> rows;  // x and out, or x and residual
  const void* weight;
  int width;            // vectors a row
  float inverse_width;  // of elements
  float eps;
};

struct PlainWeight {
  static __device__ float apply(float w) { return w; }
};
struct GemmaWeight {
  static __device__ float apply(float w) { return 1.0f + w; }
};

// One vector of x and, with kAdd, of the residual. Its value is their sum in float32: the norm
// takes it before it is rounded.
template <class T, int kSize, bool kAdd>
struct Piece {
  Vec<T, kSize> in[kAdd ? 2 : 1];

  __device__ void read(const NormArgs& a, uint32_t row, int vector) {
    const int64_t column = static_cast<int64_t>(vector) * kSize;
    in[0] = load_streaming<kSize>(a.rows.template row<const T>(0, row) + column);
    if constexpr (kAdd) {
      in[1] = load_streaming<kSize>(a.rows.template row<const T>(1, row) + column);
    }
  }
  __device__ void sum(float (&value)[kSize]) const {
    widen(in[0], value);
    if constexpr (kAdd) {
      float residual[kSize];
      widen(in[1], residual);
#pragma unroll
      for (int i = 0; i < kSize; ++i) value[i] += residual[i];
    }
  }
};

template <int kSize>
__device__ inline float sum_squares(float sum, const float (&value)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = fmaf(value[i], value[i], sum);
  return sum;
}

// Writes one vector of the result, and the sum where there is one.
template <bool kAdd, class Weight, class T, int kSize>
__device__ inline void finish(const NormArgs& a, uint32_t row, int vector,
                              const float (&value)[kSize], Vec<T, kSize> weight, float scale) {
  const int64_t column = static_cast<int64_t>(vector) * kSize;
  float w[kSize], result[kSize];
  widen(weight, w);
#pragma unroll
  for (int i = 0; i < kSize; ++i) result[i] = value[i] * scale * Weight::apply(w[i]);
  if constexpr (kAdd) store(a.rows.template row<T>(1, row) + column, narrow<T>(value));
  store(a.rows.template row<T>(kAdd ? 0 : 1, row) + column, narrow<T>(result));
}

template <int kSize, class T>
__device__ inline Vec<T, kSize> weight_at(const NormArgs& a, int vector) {
  return load<kSize>(static_cast<const T*>(a.weight) + static_cast<int64_t>(vector) * kSize);
}

__device__ inline float scale_of(const NormArgs& a, float squares) {
  return rsqrtf(squares * a.inverse_width + a.eps);
}

constexpr int kGroupThreads = 256;

// kLanes lanes share a row; each holds kPieces vectors of it. A lane without a vector or a row of
// its own reads the last one: loads without branches are in flight together.
template <class T, bool kAdd, class Weight, int kLanes, int kPieces>
__global__ void __launch_bounds__(kGroupThreads) norm_group_kernel(NormArgs a) {
  constexpr int kSize = kFull<T>;
  wait_for_previous();
  let_next_start();
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const uint32_t place = blockIdx.x * (kGroupThreads / kLanes) + threadIdx.x / kLanes;
  const uint32_t row = place < a.rows.rows ? place : a.rows.rows - 1;
  Piece<T, kSize, kAdd> piece[kPieces];
  Vec<T, kSize> weight[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int vector = p * kLanes + lane < a.width ? p * kLanes + lane : a.width - 1;
    piece[p].read(a, row, vector);
    weight[p] = weight_at<kSize, T>(a, vector);
  }
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    float value[kSize];
    piece[p].sum(value);
    if (p * kLanes + lane < a.width) squares = sum_squares(squares, value);
  }
  const float scale = scale_of(a, reduce_lanes<kLanes>(squares, Add{}));
  if (place != row) return;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int vector = p * kLanes + lane;
    float value[kSize];
    piece[p].sum(value);
    if (vector < a.width) finish<kAdd, Weight>(a, row, vector, value, weight[p], scale);
  }
}

constexpr int kBlockPieces = 4;
constexpr int kBlockThreads = 512;

// A block a row; each thread holds kBlockPieces vectors of it.
template <class T, bool kAdd, class Weight>
__global__ void __launch_bounds__(kBlockThreads) norm_block_kernel(NormArgs a) {
  constexpr int kSize = kFull<T>;
  __shared__ Shared<float, kMaxWarps> scratch;
  wait_for_previous();
  let_next_start();
  const uint32_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  Piece<T, kSize, kAdd> piece[kBlockPieces];
  Vec<T, kSize> weight[kBlockPieces];
#pragma unroll
  for (int p = 0; p < kBlockPieces; ++p) {
    const int vector = p * step + first;
    piece[p].read(a, row, vector < a.width ? vector : a.width - 1);
  }
#pragma unroll
  for (int p = 0; p < kBlockPieces; ++p) {  // on their way while the block adds
    const int vector = p * step + first;
    weight[p] = weight_at<kSize, T>(a, vector < a.width ? vector : a.width - 1);
  }
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kBlockPieces; ++p) {
    float value[kSize];
    piece[p].sum(value);
    if (p * step + first < a.width) squares = sum_squares(squares, value);
  }
  const float scale = scale_of(a, reduce_block(squares, 0.0f, Add{}, scratch));
#pragma unroll
  for (int p = 0; p < kBlockPieces; ++p) {
    float value[kSize];
    piece[p].sum(value);
    if (p * step + first < a.width) {
      finish<kAdd, Weight>(a, row, p * step + first, value, weight[p], scale);
    }
  }
}

// A block a row of any width and alignment, read twice.
template <class T, bool kAdd, class Weight, int kSize>
__global__ void __launch_bounds__(kMaxThreads) norm_loop_kernel(NormArgs a) {
  __shared__ Shared<float, kMaxWarps> scratch;
  wait_for_previous();
  let_next_start();
  const uint32_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  Piece<T, kSize, kAdd> piece;
  float value[kSize];
  float squares = 0;
  for (int vector = first; vector < a.width; vector += step) {
    piece.read(a, row, vector);
    piece.sum(value);
    squares = sum_squares(squares, value);
  }
  const float scale = scale_of(a, reduce_block(squares, 0.0f, Add{}, scratch));
  for (int vector = first; vector < a.width; vector += step) {
    piece.read(a, row, vector);
    piece.sum(value);
    finish<kAdd, Weight>(a, row, vector, value, weight_at<kSize, T>(a, vector), scale);
  }
}

template <class T, bool kAdd, class Weight, int kLanes, int kPieces>
void launch_norm_group(const char* op, const NormArgs& a, Stream stream) {
  const int64_t blocks = ceil_div(a.rows.rows, kGroupThreads / kLanes);
  launch({op, stream, blocks, kGroupThreads}, norm_group_kernel<T, kAdd, Weight, kLanes, kPieces>,
         a);
}

template <class T, bool kAdd, class Weight>
void launch_norm(const char* op, NormArgs a, bool aligned, Stream stream) {
  constexpr int kSize = kFull<T>;
  const auto by_block = [&](auto kernel, int64_t threads) {
    const int64_t rounded = round_up(threads, kBlockUnit);
    launch(
        {op, stream, a.rows.rows, static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads)},
        kernel, a);
  };
  if (!aligned) return by_block(norm_loop_kernel<T, kAdd, Weight, 1>, ceil_div(a.width, 8));
  a.width /= kSize;
  if (a.width <= 16) return launch_norm_group<T, kAdd, Weight, 16, 1>(op, a, stream);
  if (a.width <= 32) return launch_norm_group<T, kAdd, Weight, 32, 1>(op, a, stream);
  if (a.width <= 128) return launch_norm_group<T, kAdd, Weight, 32, 4>(op, a, stream);
  if (a.width <= kBlockThreads * kBlockPieces) {
    return by_block(norm_block_kernel<T, kAdd, Weight>, ceil_div(a.width, kBlockPieces));
  }
  by_block(norm_loop_kernel<T, kAdd, Weight, kSize>, kMaxThreads);
}

template <bool kAdd, class Weight>
void launch_norm(const char* op, const NormRows& in, Stream stream) {
  for_float_type(in.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool aligned = in.width % kFull<T> == 0 &&
                         aligned_rows(in.rows, sizeof(T), kVectorBytes) &&
                         reinterpret_cast<uintptr_t>(in.weight) % kVectorBytes == 0;
    const float inverse = static_cast<float>(1.0 / static_cast<double>(in.width));
    for_pieces(in.rows, sizeof(T), 1, [&](const RowsOf<2>& rows) {
      const NormArgs a = {rows, in.weight, static_cast<int>(in.width), inverse, in.eps};
      launch_norm<T, kAdd, Weight>(op, a, aligned, stream);
    });
  });
}

}  // namespace opmux::gpu

#endif
