// SPDX-License-Identifier: Apache-2.0
// The kernels behind row_quant.h. Which one runs depends on widths and alignment alone, so that a
// row's result does not depend on how many rows there are:
//   up to 2048 vectors  a block a row, kept in registers between the steps
//   more, or unaligned  a block a row, read once for each step
#pragma once

#include "quantization/row_quant.h"

#if OPMUX_KERNEL

#include "quantization/quantize.cuh"

namespace opmux::gpu {

struct RowQuantArgs {
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
  float inverse_width;   // of elements
  float eps;
};

enum class Before { kNothing, kNorm, kAddNorm };

// One vector of x and, with kAddNorm, of the residual. Its value is their sum in float32.
template <class T, int kSize, Before kBefore>
struct QuantPiece {
  static constexpr bool kAdd = kBefore == Before::kAddNorm;
  Vec<T, kSize> in[kAdd ? 2 : 1];

  __device__ void read(const RowQuantArgs& a, int64_t row, int vector) {
    const int64_t column = static_cast<int64_t>(vector) * kSize;
    in[0] = load_streaming<kSize>(static_cast<const T*>(a.x) + row * a.x_stride + column);
    if constexpr (kAdd) {
      in[1] = load_streaming<kSize>(static_cast<const T*>(a.residual) + row * a.residual_stride +
                                    column);
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

template <class T, int kSize>
__device__ inline Vec<T, kSize> quant_weight(const RowQuantArgs& a, int vector) {
  return load<kSize>(static_cast<const T*>(a.weight) + static_cast<int64_t>(vector) * kSize);
}

template <class T, int kSize>
__device__ inline void multiply(float (&value)[kSize], const Vec<T, kSize>& weight) {
  float w[kSize];
  widen(weight, w);
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] *= w[i];
}

template <int kSize>
__device__ inline void multiply(float (&value)[kSize], float factor) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] *= factor;
}

template <class T, int kSize>
__device__ inline void store_sum(const RowQuantArgs& a, int64_t row, int vector,
                                 const float (&sum)[kSize]) {
  const int64_t column = static_cast<int64_t>(vector) * kSize;
  store(static_cast<T*>(a.residual) + row * a.residual_stride + column, narrow<T>(sum));
}

// What a step over a row finds.
struct Found {
  float squares = 0;
  float peak = 0;  // the largest |value * weight|

  template <int kSize>
  __device__ void add_squares(const float (&value)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) squares = fmaf(value[i], value[i], squares);
  }
  template <int kSize>
  __device__ void add_peak(const float (&value)[kSize]) {
    peak = largest(peak, value);
  }
};

using FoundScratch = Shared<float, 2 * kMaxWarps>;

// Both over the block, with one barrier. All its threads call it; every thread holds the result.
__device__ inline Found reduce_found(Found found, FoundScratch& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  found.squares = reduce_lanes<kWarp>(found.squares, Add{});
  found.peak = reduce_lanes<kWarp>(found.peak, Largest{});
  if (lane == 0) {
    scratch[2 * warp] = found.squares;
    scratch[2 * warp + 1] = found.peak;
  }
  __syncthreads();
  found.squares = reduce_lanes<kWarp>(lane < warps ? scratch[2 * lane] : 0.0f, Add{});
  found.peak = reduce_lanes<kWarp>(lane < warps ? scratch[2 * lane + 1] : 0.0f, Largest{});
  return found;
}

// What the norm multiplies a row by. Where the row has a NaN it is NaN, and no maximum counts it.
template <Before kBefore>
__device__ inline float norm_factor(const RowQuantArgs& a, const Found& found) {
  if constexpr (kBefore == Before::kNothing) return 1.0f;
  return rsqrtf(found.squares * a.inverse_width + a.eps);
}

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
constexpr int kRowQuantPieces = 4;
constexpr int kRowQuantThreads = 512;
constexpr int kRowQuantFewThreads = 256;  // whose blocks are worth fewer registers a thread

// Each thread holds kRowQuantPieces vectors; one without a vector of its own reads the last one:
// loads without branches are in flight together.
template <class T, class Q, Before kBefore, bool kGroups, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == kRowQuantFewThreads ? 3 : 1)
    row_quant_kernel(RowQuantArgs a) {
  constexpr int kSize = kFull<T>, kPieces = kRowQuantPieces;
  constexpr bool kNorm = kBefore != Before::kNothing, kAdd = kBefore == Before::kAddNorm;
  __shared__ FoundScratch scratch;
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  QuantPiece<T, kSize, kBefore> piece[kPieces];
  Vec<T, kSize> weight[kNorm ? kPieces : 1];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int vector = p * step + first;
    piece[p].read(a, row, vector < a.width ? vector : a.width - 1);
  }
  if constexpr (kNorm) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int vector = p * step + first;
      weight[p] = quant_weight<T, kSize>(a, vector < a.width ? vector : a.width - 1);
    }
  }
  Found found;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    float value[kSize];
    piece[p].sum(value);
    if (kNorm && p * step + first < a.width) found.add_squares(value);
    if constexpr (!kGroups) {
      if constexpr (kNorm) multiply(value, weight[p]);
      found.add_peak(value);
    }
  }
  found = reduce_found(found, scratch);
  const float factor = norm_factor<kBefore>(a, found);
  const bool power_of_two = a.scales.layout == kPackedScales;

  float peak[kPieces];
  if constexpr (kGroups) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      float value[kSize];
      piece[p].sum(value);
      multiply(value, factor);
      multiply(value, weight[p]);
      peak[p] = largest(0.0f, value);
    }
    // The lanes of a group: a power of two of them, aligned.
    for (int mask = a.vectors_of_group / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) peak[p] = fmaxf(peak[p], shuffle_xor(peak[p], mask));
    }
  }
  Scale scale;
  if constexpr (!kGroups) scale = scale_of<Q>(factor * found.peak, power_of_two);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int vector = p * step + first;
    if constexpr (kGroups) scale = scale_of<Q>(peak[p], power_of_two);
    if (vector >= a.width) continue;
    float value[kSize];
    piece[p].sum(value);
    if constexpr (kAdd) store_sum<T>(a, row, vector, value);
    if constexpr (kNorm) {
      multiply(value, factor);
      multiply(value, weight[p]);
    }
    store_quantized<Q>(a.q + row * a.q_stride + static_cast<int64_t>(vector) * kSize, value,
                       scale.inverse);
    if constexpr (kGroups) {
      if (vector % a.vectors_of_group == 0) {
        write_scale(a.scales, row, vector / a.vectors_of_group, scale.value);
      }
    }
  }
  if constexpr (kGroups) {
    write_padding(a.scales, row, first, step);
  } else {
    if (first == 0) write_scale(a.scales, row, 0, scale.value);
  }
}

// Rows of any width and, with kSize 1, alignment; groups of any multiple of kSize.
template <class T, class Q, Before kBefore, bool kGroups, int kSize>
__global__ void __launch_bounds__(kMaxThreads) row_quant_loop_kernel(RowQuantArgs a) {
  constexpr bool kNorm = kBefore != Before::kNothing, kAdd = kBefore == Before::kAddNorm;
  __shared__ FoundScratch scratch;
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  QuantPiece<T, kSize, kBefore> piece;
  float value[kSize];
  Found found;
  for (int vector = first; vector < a.width; vector += step) {
    piece.read(a, row, vector);
    piece.sum(value);
    if constexpr (kNorm) found.add_squares(value);
    if constexpr (!kGroups) {
      if constexpr (kNorm) multiply(value, quant_weight<T, kSize>(a, vector));
      found.add_peak(value);
    }
  }
  found = reduce_found(found, scratch);
  const float factor = norm_factor<kBefore>(a, found);
  const bool power_of_two = a.scales.layout == kPackedScales;
  const auto normed = [&](int vector) {
    if constexpr (kNorm) {
      multiply(value, factor);
      multiply(value, quant_weight<T, kSize>(a, vector));
    }
  };
  const auto finish = [&](int vector, float inverse) {
    piece.read(a, row, vector);
    piece.sum(value);
    if constexpr (kAdd) store_sum<T>(a, row, vector, value);
    normed(vector);
    store_quantized<Q>(a.q + row * a.q_stride + static_cast<int64_t>(vector) * kSize, value,
                       inverse);
  };
  if constexpr (!kGroups) {
    const Scale scale = scale_of<Q>(factor * found.peak, power_of_two);
    for (int vector = first; vector < a.width; vector += step) finish(vector, scale.inverse);
    if (first == 0) write_scale(a.scales, row, 0, scale.value);
  } else {
    // kQuantLanes lanes a group. All lanes of a warp go through the same number of groups.
    const int lane = first % kQuantLanes, of_group = a.vectors_of_group;
    const int groups = a.width / of_group;
    for (int base = 0; base < groups; base += step / kQuantLanes) {
      const int group = base + first / kQuantLanes;
      const int begin = (group < groups ? group : groups - 1) * of_group, end = begin + of_group;
      float peak = 0;
      for (int64_t vector = begin + lane; vector < end; vector += kQuantLanes) {
        piece.read(a, row, static_cast<int>(vector));
        piece.sum(value);
        normed(static_cast<int>(vector));
        peak = largest(peak, value);
      }
      const Scale scale = scale_of<Q>(reduce_lanes<kQuantLanes>(peak, Largest{}), power_of_two);
      if (group >= groups) continue;
      for (int64_t vector = begin + lane; vector < end; vector += kQuantLanes) {
        finish(static_cast<int>(vector), scale.inverse);
      }
      if (lane == 0) write_scale(a.scales, row, group, scale.value);
    }
    write_padding(a.scales, row, first, step);
  }
}

template <class T, class Q, Before kBefore, bool kGroups>
void launch_row_quant(const char* op, RowQuantArgs a, int64_t group_size, bool aligned,
                      Stream stream) {
  constexpr int kSize = kFull<T>;
  const auto by_block = [&](auto kernel, int64_t threads) {
    const int64_t rounded = round_up(threads > 0 ? threads : 1, kBlockUnit);
    launch({op, stream, a.scales.tokens,
            static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads)},
           kernel, a);
  };
  a.vectors_of_group = static_cast<int>(group_size);
  if (!aligned || a.width == 0 || group_size % kSize != 0) {
    return by_block(row_quant_loop_kernel<T, Q, kBefore, kGroups, 1>, ceil_div(a.width, 8));
  }
  a.width /= kSize;
  a.vectors_of_group /= kSize;
  const int lanes = a.vectors_of_group;
  const bool held = !kGroups || (lanes <= kQuantLanes && (lanes & (lanes - 1)) == 0);
  const int64_t threads = ceil_div(a.width, kRowQuantPieces);
  if (held && threads <= kRowQuantFewThreads) {
    return by_block(row_quant_kernel<T, Q, kBefore, kGroups, kRowQuantFewThreads>, threads);
  }
  if (held && threads <= kRowQuantThreads) {
    return by_block(row_quant_kernel<T, Q, kBefore, kGroups, kRowQuantThreads>, threads);
  }
  by_block(row_quant_loop_kernel<T, Q, kBefore, kGroups, kSize>, kMaxThreads);
}

template <Before kBefore, bool kGroups>
void launch_row_quant(const char* op, const RowQuantRows& in, Stream stream) {
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
      const RowQuantArgs a = {static_cast<const T*>(in.x) + first * in.x_stride,
                              in.x_stride,
                              static_cast<T*>(in.residual) + first * in.residual_stride,
                              in.residual_stride,
                              in.weight,
                              static_cast<uint8_t*>(out.q),
                              out.stride,
                              out.scales,
                              static_cast<int>(width),
                              0,
                              inverse_width,
                              in.eps};
      launch_row_quant<T, Q, kBefore, kGroups>(op, a, out.group_size, aligned, stream);
    });
  };
  for_float_type(in.type, [&](auto type_tag) {
    for_quantized_type(in.out.int8, [&](auto quantized_tag) { run(type_tag, quantized_tag); });
  });
}

}  // namespace opmux::gpu

#endif
