// SPDX-License-Identifier: Apache-2.0
// layernorm(x, weight, bias, eps) -> out: (x - mean) / sqrt(variance + eps) * weight + bias.
// The variance is the mean square of the centred values. Which kernel runs, and in which order it
// adds, depends on the width of a row and on alignment alone:
//   up to 128 vectors   lanes of a warp share a row, several rows a block
//   up to 2048          a block a row, kept in registers between the steps
//   more, or unaligned  a block a row, read once for each step
#include "gpu.h"

#if OPMUX_KERNEL
#include "reduce.cuh"
#include "rows.cuh"
#include "vec.cuh"
#endif

namespace opmux::gpu {

struct LayerNormRows {
  Plane<2> rows;  // x and out
  const void* weight;
  const void* bias;  // nullptr: none
  int64_t width;
  float eps;
  FloatType type;
};

void launch_layernorm(const LayerNormRows& in, Stream stream);

#if OPMUX_KERNEL

struct LayerNormArgs {
  RowsOf<2> rows;
  const void* weight;
  const void* bias;
  int width;            // vectors a row
  float inverse_width;  // of elements
  float eps;
};

constexpr int kLayerNormPieces = 4;
constexpr int kLayerNormGroup = 32;  // lanes that share a short row
constexpr int kLayerNormGroupThreads = 256;
constexpr int kLayerNormThreads = 512;

template <class T, int kSize>
__device__ inline Vec<T, kSize> layernorm_read(const LayerNormArgs& a, uint32_t row, int vector) {
  return load_streaming<kSize>(a.rows.template row<const T>(0, row) +
                               static_cast<int64_t>(vector) * kSize);
}

template <class T, int kSize>
__device__ inline float layernorm_sum(float sum, const Vec<T, kSize>& in) {
  float value[kSize];
  widen(in, value);
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum += value[i];
  return sum;
}

template <class T, int kSize>
__device__ inline float layernorm_squares(float squares, const Vec<T, kSize>& in, float mean) {
  float value[kSize];
  widen(in, value);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float centred = value[i] - mean;
    squares = fmaf(centred, centred, squares);
  }
  return squares;
}

__device__ inline float layernorm_scale(const LayerNormArgs& a, float squares) {
  return rsqrtf(squares * a.inverse_width + a.eps);
}

template <class T, int kSize>
__device__ inline void layernorm_finish(const LayerNormArgs& a, uint32_t row, int vector,
                                        const Vec<T, kSize>& in, float mean, float scale) {
  const int64_t column = static_cast<int64_t>(vector) * kSize;
  float value[kSize], weight[kSize], bias[kSize] = {};
  widen(in, value);
  widen(load<kSize>(static_cast<const T*>(a.weight) + column), weight);
  if (a.bias != nullptr) widen(load<kSize>(static_cast<const T*>(a.bias) + column), bias);
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] = (value[i] - mean) * scale * weight[i] + bias[i];
  store(a.rows.template row<T>(1, row) + column, narrow<T>(value));
}

// kGroup: kLayerNormGroup lanes a row, else a block a row. Each thread holds kLayerNormPieces
// vectors; one without a vector or a row of its own reads the last one.
template <class T, bool kGroup>
__global__ void __launch_bounds__(kGroup ? kLayerNormGroupThreads : kLayerNormThreads)
    layernorm_kernel(LayerNormArgs a) {
  constexpr int kSize = kFull<T>;
  __shared__ Shared<float, kMaxWarps> scratch, second_scratch;
  wait_for_previous();
  let_next_start();
  const int thread = static_cast<int>(threadIdx.x);
  const int step = kGroup ? kLayerNormGroup : static_cast<int>(blockDim.x);
  const int first = thread % step;
  const uint32_t place = kGroup ? blockIdx.x * (kLayerNormGroupThreads / kLayerNormGroup) +
                                      static_cast<uint32_t>(thread / kLayerNormGroup)
                                : blockIdx.x;
  const uint32_t row = place < a.rows.rows ? place : a.rows.rows - 1;
  const auto reduce = [](float value, Shared<float, kMaxWarps>& shared) {
    if constexpr (kGroup) return reduce_lanes<kLayerNormGroup>(value, Add{});
    return reduce_block(value, 0.0f, Add{}, shared);
  };
  Vec<T, kSize> in[kLayerNormPieces];
#pragma unroll
  for (int p = 0; p < kLayerNormPieces; ++p) {
    const int vector = p * step + first;
    in[p] = layernorm_read<T, kSize>(a, row, vector < a.width ? vector : a.width - 1);
  }
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kLayerNormPieces; ++p) {
    if (p * step + first < a.width) sum = layernorm_sum(sum, in[p]);
  }
  const float mean = reduce(sum, scratch) * a.inverse_width;
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kLayerNormPieces; ++p) {
    if (p * step + first < a.width) squares = layernorm_squares(squares, in[p], mean);
  }
  const float scale = layernorm_scale(a, reduce(squares, second_scratch));
  if (place != row) return;
#pragma unroll
  for (int p = 0; p < kLayerNormPieces; ++p) {
    const int vector = p * step + first;
    if (vector < a.width) layernorm_finish(a, row, vector, in[p], mean, scale);
  }
}

template <class T, int kSize>
__global__ void __launch_bounds__(kMaxThreads) layernorm_loop_kernel(LayerNormArgs a) {
  __shared__ Shared<float, kMaxWarps> scratch, second_scratch;
  wait_for_previous();
  let_next_start();
  const uint32_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int vector = first; vector < a.width; vector += step) {
    sum = layernorm_sum(sum, layernorm_read<T, kSize>(a, row, vector));
  }
  const float mean = reduce_block(sum, 0.0f, Add{}, scratch) * a.inverse_width;
  float squares = 0;
  for (int vector = first; vector < a.width; vector += step) {
    squares = layernorm_squares(squares, layernorm_read<T, kSize>(a, row, vector), mean);
  }
  const float scale = layernorm_scale(a, reduce_block(squares, 0.0f, Add{}, second_scratch));
  for (int vector = first; vector < a.width; vector += step) {
    layernorm_finish(a, row, vector, layernorm_read<T, kSize>(a, row, vector), mean, scale);
  }
}

template <class T>
void launch_layernorm(LayerNormArgs a, bool aligned, Stream stream) {
  constexpr int kSize = kFull<T>;
  const char* const op = "layernorm";
  const auto by_block = [&](auto kernel, int64_t threads) {
    const int64_t rounded = round_up(threads, kBlockUnit);
    launch(
        {op, stream, a.rows.rows, static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads)},
        kernel, a);
  };
  if (!aligned) return by_block(layernorm_loop_kernel<T, 1>, ceil_div(a.width, 8));
  a.width /= kSize;
  if (a.width <= kLayerNormGroup * kLayerNormPieces) {
    constexpr int kRows = kLayerNormGroupThreads / kLayerNormGroup;
    return launch({op, stream, ceil_div(a.rows.rows, kRows), kLayerNormGroupThreads},
                  layernorm_kernel<T, true>, a);
  }
  if (a.width <= kLayerNormThreads * kLayerNormPieces) {
    return by_block(layernorm_kernel<T, false>, ceil_div(a.width, kLayerNormPieces));
  }
  by_block(layernorm_loop_kernel<T, kSize>, kMaxThreads);
}

void launch_layernorm(const LayerNormRows& in, Stream stream) {
  for_float_type(in.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const uint64_t columns =
        reinterpret_cast<uintptr_t>(in.weight) | reinterpret_cast<uintptr_t>(in.bias);
    const bool aligned = in.width % kFull<T> == 0 && columns % kVectorBytes == 0 &&
                         aligned_rows(in.rows, sizeof(T), kVectorBytes);
    const float inverse = static_cast<float>(1.0 / static_cast<double>(in.width));
    for_pieces(in.rows, sizeof(T), 1, [&](const RowsOf<2>& rows) {
      const LayerNormArgs a = {rows,    in.weight, in.bias, static_cast<int>(in.width),
                               inverse, in.eps};
      launch_layernorm<T>(a, aligned, stream);
    });
  });
}
#endif

#if OPMUX_LAUNCHER
void layernorm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
               Tensor out) {
  const char* const op = "layernorm";
  check_same_device(op, x, weight, out);
  check_same_dtype(op, x, weight, out);
  check_same_shape(op, x, out);
  const FloatType type = float_type(op, x);
  const Rows<2> rows(op, {reads(x), writes(out)});
  const int64_t width = rows.width(0);
  check(weight.dim() == 1 && weight.size(0) == width, op,
        "weight must have one element per column");
  if (bias.has_value()) {
    check_same_device(op, x, *bias);
    check_same_dtype(op, x, *bias);
    check(bias->dim() == 1 && bias->size(0) == width, op, "bias must have one element per column");
  }
  check_row(op, width);
  if (rows.size() * width == 0) return;
  const void* const bias_data = bias.has_value() ? bias->const_data_ptr() : nullptr;
  const Place place(op, x);
  rows.for_planes([&](const Plane<2>& plane) {
    launch_layernorm(
        {plane, weight.const_data_ptr(), bias_data, width, static_cast<float>(eps), type},
        place.stream());
  });
}
OPMUX_OP(layernorm, layernorm);
#endif

}  // namespace opmux::gpu
