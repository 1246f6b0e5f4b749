// SPDX-License-Identifier: Apache-2.0
// A few neighbouring elements, moved by one memory instruction.
#pragma once

#include "gpu.h"

#if OPMUX_KERNEL

namespace opmux::gpu {

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T item[kSize];
};
template <class T, int kSize>
using VecWord = typename Word<static_cast<int>(sizeof(T)) * kSize>::Type;

// How many elements a full vector has.
template <class T>
constexpr int kFull = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int kSize>
union VecBits {
  VecWord<T, kSize> word;
  Vec<T, kSize> vec;
};

// The pointer is aligned to the vector.
template <int kSize, class T>
__device__ inline Vec<T, kSize> load(const T* from) {
  VecBits<T, kSize> bits;
  bits.word = *reinterpret_cast<const VecWord<T, kSize>*>(from);
  return bits.vec;
}
// The vector, or zeros. nvcc moves a load in a branch behind the branch of its use, where it waits
// for the one before; a word that is set in any case stays here.
template <int kSize, class T>
__device__ inline Vec<T, kSize> load_if(bool wanted, const T* from) {
  VecBits<T, kSize> bits;
  bits.word = {};
  if (wanted) bits.word = *reinterpret_cast<const VecWord<T, kSize>*>(from);
  return bits.vec;
}
template <int kSize, class T>
__device__ inline Vec<T, kSize> load_streaming(const T* from) {
  VecBits<T, kSize> bits;
  bits.word = load_once(reinterpret_cast<const VecWord<T, kSize>*>(from));
  return bits.vec;
}
template <int kSize, class T>
__device__ inline void store(T* to, Vec<T, kSize> vec) {
  VecBits<T, kSize> bits;
  bits.vec = vec;
  store_word(reinterpret_cast<VecWord<T, kSize>*>(to), bits.word);
}
template <int kSize, class T>
__device__ inline void store_streaming(T* to, Vec<T, kSize> vec) {
  VecBits<T, kSize> bits;
  bits.vec = vec;
  store_once(reinterpret_cast<VecWord<T, kSize>*>(to), bits.word);
}

template <class T, int kSize>
__device__ inline void widen(const Vec<T, kSize>& vec, float (&value)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] = to_float(vec.item[i]);
}
// In pairs: one instruction an element, as the upper half of a word needs no shift.
template <int kSize>
__device__ inline void widen(const Vec<bfloat16, kSize>& vec, float (&value)[kSize]) {
  if constexpr (kSize % 2 == 1) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) value[i] = to_float(vec.item[i]);
  } else {
    union {
      Vec<bfloat16, kSize> vec;
      uint32_t pair[kSize / 2];
    } bits;
    bits.vec = vec;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      value[2 * i] = bits_as_float(bits.pair[i] << 16);
      value[2 * i + 1] = bits_as_float(bits.pair[i] & 0xffff0000u);
    }
  }
}

template <class T, int kSize>
__device__ inline Vec<T, kSize> narrow(const float (&value)[kSize]) {
  Vec<T, kSize> vec;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
    union {
      Vec<T, kSize> vec;
      uint32_t pair[kSize / 2];
    } bits;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      bits.pair[i] = pair_bits<T>(value[2 * i], value[2 * i + 1]);
    }
    vec = bits.vec;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) vec.item[i] = from_float<T>(value[i]);
  }
  return vec;
}

// Whether every row of every operand allows vectors of `bytes`. Host code.
template <size_t N>
bool aligned_rows(const Plane<N>& plane, int item_bytes, int bytes) {
  uint64_t all = 0;
  for (size_t k = 0; k < N; ++k) {
    all |= reinterpret_cast<uintptr_t>(plane.data[k]);
    if (plane.inner_rows > 1) all |= static_cast<uint64_t>(plane.inner_stride[k] * item_bytes);
    if (plane.rows > plane.inner_rows) {
      all |= static_cast<uint64_t>(plane.outer_stride[k] * item_bytes);
    }
  }
  return all % static_cast<uint64_t>(bytes) == 0;
}

}  // namespace opmux::gpu

#endif
