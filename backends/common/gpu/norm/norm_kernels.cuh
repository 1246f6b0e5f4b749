// SPDX-License-Identifier: Apache-2.0
// The kernels of the RMS norms. Which one runs, and in which order it adds, depends on the width of
// a row and on alignment alone, so that a row's result does not depend on how many rows there are:
//   up to 128 vectors   lanes of a warp share a row, several rows a block
//   up to 2048          a block a row
//   more, or unaligned  a block a row, read twice
// The first two keep the row in registers between the sum and the result. One block a row is as
// fast as blocks that fetch the next row ahead, in registers or through the copy engine: the blocks
// of a multiprocessor cover for one another.
#pragma once

#include "norm/rmsnorm.h"

#if OPMUX_KERNEL

#include "norm/pieces.cuh"

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

__device__ inline float scale_of(const NormArgs& a, float squares) {
  return rsqrtf(squares * a.inverse_width + a.eps);
}

template <class Weight, class T, int kSize>
__device__ inline void store_norm(T* to, const float (&value)[kSize], const Vec<T, kSize>& weight,
                                  float scale) {
  float w[kSize], result[kSize];
  widen(weight, w);
#pragma unroll
  for (int i = 0; i < kSize; ++i) result[i] = value[i] * scale * Weight::apply(w[i]);
  store(to, narrow<T>(result));
}

constexpr int kGroupThreads = 256;

// How many blocks the registers must allow on a multiprocessor: so many that 32 to 64 KiB of x are
// on their way, as far as nothing is spilled.
constexpr int norm_blocks(bool add, int lanes, int pieces) {
  if (lanes <= 32 || lanes > 256) return 1;
  const int blocks = (add && pieces < 4 ? 3072 : 4096) / (lanes * pieces);
  return blocks * lanes > kResidentThreads ? kResidentThreads / lanes : blocks;
}

// kLanes threads share a row: lanes of a warp, or a block. Lanes without a row of their own go
// along with the last one.
template <class T, bool kAdd, class Weight, int kLanes, int kPieces>
__global__ void __launch_bounds__(kLanes > 32 ? kLanes : kGroupThreads,
                                  norm_blocks(kAdd, kLanes, kPieces)) norm_kernel(NormArgs a) {
  constexpr int kSize = kFull<T>;
  __shared__ Shared<float, kMaxWarps> scratch;
  const uint32_t place =
      kLanes > 32 ? blockIdx.x : blockIdx.x * (kGroupThreads / kLanes) + threadIdx.x / kLanes;
  const uint32_t row = place < a.rows.rows ? place : a.rows.rows - 1;
  const Part<kLanes> part = {static_cast<int>(threadIdx.x % kLanes), a.width};
  // x and out; or x, which is also the result, and the residual
  T* const x = a.rows.template row<T>(0, row);
  T* const other = a.rows.template row<T>(1, row);
  const T* const weights = static_cast<const T*>(a.weight);
  prefetch_pieces<kPieces>(x, part);
  if constexpr (kAdd) prefetch_pieces<kPieces>(other, part);
  prefetch_pieces<kPieces>(weights, part);
  wait_for_previous();
  let_next_start();
  const auto in = load_pieces<kPieces>(static_cast<const T*>(x), part);
  Pieces<T, kAdd ? kPieces : 1> residual;
  if constexpr (kAdd) residual = load_pieces<kPieces>(static_cast<const T*>(other), part);
  const auto weight = load_pieces<kPieces>(weights, part);
  const auto value_of = [&](int p, float(&value)[kSize]) {
    widen(in[p], value);
    if constexpr (kAdd) add(residual[p], value);
  };
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    float value[kSize];
    value_of(p, value);
    squares += sum_squares(value);
  }
  if constexpr (kLanes > 32) {
    squares = reduce_block<kLanes>(squares, 0.0f, Add{}, scratch);
  } else {
    squares = reduce_lanes<kLanes>(squares, Add{});
    if (place != row) return;
  }
  const float scale = scale_of(a, squares);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    float value[kSize];
    value_of(p, value);
    if (part.has(p)) {
      const int64_t column = static_cast<int64_t>(part.vector(p)) * kSize;
      if constexpr (kAdd) store(other + column, narrow<T>(value));
      store_norm<Weight>((kAdd ? x : other) + column, value, weight[p], scale);
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
  T* const x = a.rows.template row<T>(0, row);
  T* const other = a.rows.template row<T>(1, row);
  const auto value_of = [&](int64_t column, float(&value)[kSize]) {
    widen(load<kSize, T>(x + column), value);
    if constexpr (kAdd) add(load<kSize, T>(other + column), value);
  };
  float value[kSize];
  float squares = 0;
#pragma unroll 4
  for (int vector = first; vector < a.width; vector += step) {
    value_of(static_cast<int64_t>(vector) * kSize, value);
    squares += sum_squares(value);
  }
  const float scale = scale_of(a, reduce_block(squares, 0.0f, Add{}, scratch));
  for (int vector = first; vector < a.width; vector += step) {
    const int64_t column = static_cast<int64_t>(vector) * kSize;
    value_of(column, value);
    if constexpr (kAdd) store(other + column, narrow<T>(value));
    store_norm<Weight>((kAdd ? x : other) + column, value,
                       load<kSize>(static_cast<const T*>(a.weight) + column), scale);
  }
}

template <class T, bool kAdd, class Weight, int kLanes, int kPieces>
void launch_held(const char* op, const NormArgs& a, Stream stream) {
  constexpr int kThreads = kLanes > 32 ? kLanes : kGroupThreads;
  launch({op, stream, ceil_div(a.rows.rows, kThreads / kLanes), kThreads},
         norm_kernel<T, kAdd, Weight, kLanes, kPieces>, a);
}

template <class T, bool kAdd, class Weight>
void launch_norm(const char* op, NormArgs a, bool aligned, Stream stream) {
  constexpr int kSize = kFull<T>;
  const auto loop = [&](auto kernel, int64_t threads) {
    const int64_t rounded = round_up(threads, kBlockUnit);
    launch(
        {op, stream, a.rows.rows, static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads)},
        kernel, a);
  };
  if (!aligned) return loop(norm_loop_kernel<T, kAdd, Weight, 1>, ceil_div(a.width, 8));
  a.width /= kSize;
  if (a.width <= 16) return launch_held<T, kAdd, Weight, 16, 1>(op, a, stream);
  if (a.width <= 32) return launch_held<T, kAdd, Weight, 32, 1>(op, a, stream);
  if (a.width <= 128) return launch_held<T, kAdd, Weight, 32, 4>(op, a, stream);
  if (a.width <= 256) return launch_held<T, kAdd, Weight, 128, 2>(op, a, stream);
  if (a.width <= 512) return launch_held<T, kAdd, Weight, 256, 2>(op, a, stream);
  if (a.width <= 768) return launch_held<T, kAdd, Weight, 256, 3>(op, a, stream);
  if (a.width <= 1024) return launch_held<T, kAdd, Weight, 256, 4>(op, a, stream);
  if (a.width <= 2048) return launch_held<T, kAdd, Weight, 512, 4>(op, a, stream);
  loop(norm_loop_kernel<T, kAdd, Weight, kSize>, kMaxThreads);
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
