// SPDX-License-Identifier: Apache-2.0
// The kernels behind norm_quant.h. Which one runs depends on widths and alignment alone, so that a
// row's result does not depend on how many rows there are:
//   up to 2048 vectors  a block a row, kept in registers between the steps
//   more, or unaligned  a block a row, read once for each step
#pragma once

#include "norm/norm_quant.h"

#if OPMUX_KERNEL

#include "norm/pieces.cuh"
#include "quantization/quantize.cuh"

namespace opmux::gpu {

struct NormQuantArgs {
  const void* x;
  int64_t x_stride;
  void* residual;
  int64_t residual_stride;
  const void* weight;
  uint8_t* q;
  int64_t q_stride;
  ScalesOf scales;
  int width;             // vectors a row
  int vectors_of_group;  // 0: a row has one scale
  int group_shift;       // log2 of vectors_of_group, where that is a power of two
  float inverse_width;   // of elements
  float eps;
};

template <int kSize>
__device__ inline void multiply(float (&value)[kSize], float factor) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] *= factor;
}

template <class T, int kSize>
__device__ inline void multiply(float (&value)[kSize], const Vec<T, kSize>& weight) {
  float w[kSize];
  widen(weight, w);
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] *= w[i];
}

// What a step over a row finds.
struct Found {
  float squares;
  float peak;  // the largest |value * weight|
};

using FoundScratch = Shared<float, 2 * kMaxWarps>;

// Both over the block, of kThreads threads where that is not 0, with one barrier. All its threads
// call it; every thread holds the result.
template <int kThreads = 0>
__device__ inline Found reduce_found(Found found, FoundScratch& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = (kThreads > 0 ? kThreads : static_cast<int>(blockDim.x)) / kWarp;
  found.squares = reduce_lanes<kWarp>(found.squares, Add{});
  found.peak = reduce_lanes<kWarp>(found.peak, Largest{});
  if (lane == 0) {
    scratch[2 * warp] = found.squares;
    scratch[2 * warp + 1] = found.peak;
  }
  __syncthreads();
  const int last = last_lane(warps), from = lane & last;
  found.squares = from < warps ? scratch[2 * from] : 0.0f;
  found.peak = from < warps ? scratch[2 * from + 1] : 0.0f;
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    if (mask > last) continue;
    found.squares += shuffle_xor(found.squares, mask);
    found.peak = fmaxf(found.peak, shuffle_xor(found.peak, mask));
  }
  return found;
}

// The norm's factor of a row. Where the row has a NaN it is NaN, and no maximum counts it.
__device__ inline float norm_factor(const NormQuantArgs& a, float squares) {
  return rsqrtf(squares * a.inverse_width + a.eps);
}

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

// The arithmetic takes as long as the memory, so that each step is done once: what stays in
// registers is the product with the weight, in float32; the factors of the norm and of the scale,
// which come later, are multiplied first; and one lane of a group finds the scale of one piece.
// With fewer registers than four blocks a multiprocessor leave, nvcc puts loads behind arithmetic.
template <class T, class Q, bool kAdd, bool kGroups, int kThreads, int kPieces>
__global__ void __launch_bounds__(kThreads, kThreads > 256 ? 1 : 4)
    norm_quant_kernel(NormQuantArgs a) {
  constexpr int kSize = kFull<T>;
  __shared__ FoundScratch scratch;
  __shared__ Shared<float, kMaxWarps> squares_scratch;
  const int64_t row = blockIdx.x;
  const Part<kThreads> part = {static_cast<int>(threadIdx.x), a.width};
  const T* const x = static_cast<const T*>(a.x) + row * a.x_stride;
  T* const residual = static_cast<T*>(a.residual) + row * a.residual_stride;
  prefetch_pieces<kPieces>(x, part);
  if constexpr (kAdd) prefetch_pieces<kPieces>(residual, part);
  prefetch_pieces<kPieces>(static_cast<const T*>(a.weight), part);
  wait_for_previous();
  let_next_start();
  const auto in = load_pieces<kPieces>(x, part);
  Pieces<T, kAdd ? kPieces : 1> other;
  if constexpr (kAdd) other = load_pieces<kPieces>(static_cast<const T*>(residual), part);
  const auto weight = load_pieces<kPieces>(static_cast<const T*>(a.weight), part);

  float value[kPieces][kSize];
  float peak[kPieces];
  Found found = {};
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    widen(in[p], value[p]);
    if constexpr (kAdd) {
      add(other[p], value[p]);
      if (part.has(p)) {
        store(residual + static_cast<int64_t>(part.vector(p)) * kSize, narrow<T>(value[p]));
      }
    }
    found.squares += sum_squares(value[p]);
    multiply(value[p], weight[p]);
    peak[p] = largest(0.0f, value[p]);
    found.peak = fmaxf(found.peak, peak[p]);
  }
  const bool power_of_two = a.scales.layout == kPackedScales;
  float factor[kPieces];
  if constexpr (kGroups) {
    // The lanes of a group: a power of two of them, aligned, and at least kPieces.
    const int lane = part.first & (a.vectors_of_group - 1);
    for (int mask = a.vectors_of_group / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) peak[p] = fmaxf(peak[p], shuffle_xor(peak[p], mask));
    }
    const float norm =
        norm_factor(a, reduce_block<kThreads>(found.squares, 0.0f, Add{}, squares_scratch));
    float own = peak[0];
#pragma unroll
    for (int p = 1; p < kPieces; ++p) own = lane == p ? peak[p] : own;
    const Scale scale = scale_of<Q>(norm * own, power_of_two);
    const int first_lane = part.first % kWarp - lane;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) factor[p] = norm * shuffle(scale.inverse, first_lane + p);
    const int vector = lane * kThreads + part.first - lane;
    if (lane < kPieces && vector < a.width) {
      write_scale(a.scales, row, vector >> a.group_shift, scale.value);
    }
  } else {
    found = reduce_found<kThreads>(found, scratch);
    const float norm = norm_factor(a, found.squares);
    const Scale scale = scale_of<Q>(norm * found.peak, power_of_two);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) factor[p] = norm * scale.inverse;
    if (part.first == 0) write_scale(a.scales, row, 0, scale.value);
  }
  uint8_t* const q = a.q + row * a.q_stride;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    if (part.has(p)) {
      store_quantized<Q>(q + static_cast<int64_t>(part.vector(p)) * kSize, value[p], factor[p]);
    }
  }
  if constexpr (kGroups) write_padding(a.scales, row, part.first, static_cast<int>(blockDim.x));
}

// Rows of any width and, with kSize 1, alignment; groups of any multiple of kSize.
template <class T, class Q, bool kAdd, bool kGroups, int kSize>
__global__ void __launch_bounds__(kMaxThreads) norm_quant_loop_kernel(NormQuantArgs a) {
  __shared__ FoundScratch scratch;
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  const T* const x = static_cast<const T*>(a.x) + row * a.x_stride;
  T* const residual = static_cast<T*>(a.residual) + row * a.residual_stride;
  const auto sum_at = [&](int vector, float(&value)[kSize]) {
    const int64_t column = static_cast<int64_t>(vector) * kSize;
    widen(load<kSize>(x + column), value);
    if constexpr (kAdd) add(load<kSize, T>(residual + column), value);
  };
  const auto multiply_at = [&](int vector, float(&value)[kSize]) {
    const int64_t column = static_cast<int64_t>(vector) * kSize;
    multiply(value, load<kSize>(static_cast<const T*>(a.weight) + column));
  };
  float value[kSize];
  Found found = {};
#pragma unroll 4
  for (int vector = first; vector < a.width; vector += step) {
    sum_at(vector, value);
    found.squares += sum_squares(value);
    if constexpr (!kGroups) {
      multiply_at(vector, value);
      found.peak = largest(found.peak, value);
    }
  }
  found = reduce_found(found, scratch);
  const float norm = norm_factor(a, found.squares);
  const bool power_of_two = a.scales.layout == kPackedScales;
  const auto finish = [&](int vector, float factor) {
    const int64_t column = static_cast<int64_t>(vector) * kSize;
    sum_at(vector, value);
    if constexpr (kAdd) store(residual + column, narrow<T>(value));
    multiply_at(vector, value);
    store_quantized<Q>(a.q + row * a.q_stride + column, value, factor);
  };
  if constexpr (!kGroups) {
    const Scale scale = scale_of<Q>(norm * found.peak, power_of_two);
    for (int vector = first; vector < a.width; vector += step) {
      finish(vector, norm * scale.inverse);
    }
    if (first == 0) write_scale(a.scales, row, 0, scale.value);
  } else {
    // kQuantLanes lanes a group. All lanes of a warp go through the same number of groups.
    const int lane = first % kQuantLanes, of_group = a.vectors_of_group;
    const int groups = a.width / of_group;
    for (int base = 0; base < groups; base += step / kQuantLanes) {
      const int group = base + first / kQuantLanes;
      const int begin = (group < groups ? group : groups - 1) * of_group, end = begin + of_group;
      float peak = 0;
#pragma unroll 1
      for (int vector = begin + lane; vector < end; vector += kQuantLanes) {
        sum_at(vector, value);
        multiply_at(vector, value);
        peak = largest(peak, value);
      }
      peak = reduce_lanes<kQuantLanes>(peak, Largest{});
      const Scale scale = scale_of<Q>(norm * peak, power_of_two);
      if (group >= groups) continue;
#pragma unroll 1
      for (int vector = begin + lane; vector < end; vector += kQuantLanes) {
        finish(vector, norm * scale.inverse);
      }
      if (lane == 0) write_scale(a.scales, row, group, scale.value);
    }
    write_padding(a.scales, row, first, step);
  }
}

template <class T, class Q, bool kAdd, bool kGroups>
void launch_norm_quant(const char* op, NormQuantArgs a, int64_t group_size, bool aligned,
                       Stream stream) {
  constexpr int kSize = kFull<T>, kMostPieces = 4;
  const auto by_block = [&](auto kernel, int64_t threads) {
    const int64_t rounded = round_up(threads > 0 ? threads : 1, kBlockUnit);
    launch({op, stream, a.scales.tokens,
            static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads)},
           kernel, a);
  };
  a.vectors_of_group = static_cast<int>(group_size);
  if (!aligned || a.width == 0 || group_size % kSize != 0) {
    return by_block(norm_quant_loop_kernel<T, Q, kAdd, kGroups, 1>, ceil_div(a.width, 8));
  }
  a.width /= kSize;
  a.vectors_of_group /= kSize;
  const int lanes = a.vectors_of_group;
  while ((1 << a.group_shift) < lanes && lanes <= kQuantLanes) ++a.group_shift;
  const bool held =
      !kGroups || (lanes >= kMostPieces && lanes <= kQuantLanes && 1 << a.group_shift == lanes);
  if (held && a.width <= 512) {
    return by_block(norm_quant_kernel<T, Q, kAdd, kGroups, 256, 2>, 256);
  }
  if (held && a.width <= 1024) {
    return by_block(norm_quant_kernel<T, Q, kAdd, kGroups, 256, 4>, 256);
  }
  if (held && a.width <= 2048) {
    return by_block(norm_quant_kernel<T, Q, kAdd, kGroups, 512, 4>, 512);
  }
  by_block(norm_quant_loop_kernel<T, Q, kAdd, kGroups, kSize>, kMaxThreads);
}

template <bool kAdd, bool kGroups>
void launch_norm_quant(const char* op, const NormQuantRows& in, Stream stream) {
  const int64_t width = in.out.width;
  const auto run = [&](auto type_tag, auto quantized_tag) {
    using T = typename decltype(type_tag)::Type;
    using Q = typename decltype(quantized_tag)::Type;
    const bool aligned = width % kFull<T> == 0 &&
                         aligned_to(in.x, in.x_stride, sizeof(T), kVectorBytes) &&
                         aligned_to(in.residual, in.residual_stride, sizeof(T), kVectorBytes) &&
                         aligned_to(in.weight, 0, sizeof(T), kVectorBytes) &&
                         aligned_to(in.out.q, in.out.stride, 1, kFull<T>);
    const float inverse_width = static_cast<float>(1.0 / static_cast<double>(width));
    for_tokens(in.out, kMaxBlocks, [&](int64_t first, const QuantizedRows& out) {
      const NormQuantArgs a = {static_cast<const T*>(in.x) + first * in.x_stride,
                               in.x_stride,
                               static_cast<T*>(in.residual) + first * in.residual_stride,
                               in.residual_stride,
                               in.weight,
                               static_cast<uint8_t*>(out.q),
                               out.stride,
                               out.scales,
                               static_cast<int>(width),
                               0,
                               0,
                               inverse_width,
                               in.eps};
      launch_norm_quant<T, Q, kAdd, kGroups>(op, a, out.group_size, aligned, stream);
    });
  };
  for_float_type(in.type, [&](auto type_tag) {
    for_quantized_type(in.out.int8, [&](auto quantized_tag) { run(type_tag, quantized_tag); });
  });
}

}  // namespace opmux::gpu

#endif
