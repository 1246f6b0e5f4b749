// SPDX-License-Identifier: Apache-2.0
// The part of a row that a thread keeps in registers: every kStep-th vector of it. Behind the end
// of the row there are zeros, so that sums need no branch: nvcc would move each load behind the
// branch of its use, and the loads would run one after another.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

#include "reduce.cuh"
#include "rows.cuh"
#include "vec.cuh"

namespace opmux::gpu {

template <int kStep>
struct Part {
  int first;  // vector of the row
  int width;  // vectors a row

  __device__ int vector(int piece) const { return piece * kStep + first; }
  __device__ bool has(int piece) const { return vector(piece) < width; }
};

// As words: of 16-bit elements nvcc would select each half on its own.
template <class T, int kPieces>
struct Pieces {
  VecWord<T, kFull<T>> word[kPieces];

  __device__ Vec<T, kFull<T>> operator[](int piece) const {
    VecBits<T, kFull<T>> bits;
    bits.word = word[piece];
    return bits.vec;
  }
};

template <int kPieces, int kStep, class T>
__device__ inline Pieces<T, kPieces> load_pieces(const T* row, const Part<kStep>& part) {
  Pieces<T, kPieces> pieces;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    pieces.word[p] = {};
    if (part.has(p)) {
      pieces.word[p] = reinterpret_cast<const VecWord<T, kFull<T>>*>(row)[part.vector(p)];
    }
  }
  return pieces;
}

// For launches that leave multiprocessors idle: asks for a row while the kernel before still runs.
// One thread of those that read a cache line does. On an H200 256 rows gain by it, 512 lose.
constexpr unsigned kFewBlocks = 256;
constexpr int kLineBytes = 128;

template <int kPieces, int kStep, class T>
__device__ inline void prefetch_pieces(const T* row, const Part<kStep>& part) {
  if (gridDim.x > kFewBlocks || part.first % (kLineBytes / kVectorBytes) != 0) return;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    if (part.has(p)) prefetch(row + static_cast<int64_t>(part.vector(p)) * kFull<T>);
  }
}

// Adds in float32.
template <class T, int kSize>
__device__ inline void add(const Vec<T, kSize>& vec, float (&value)[kSize]) {
  float other[kSize];
  widen(vec, other);
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] += other[i];
}

template <int kSize>
__device__ inline float sum_squares(const float (&value)[kSize]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = fmaf(value[i], value[i], sum);
  return sum;
}

}  // namespace opmux::gpu

#endif
