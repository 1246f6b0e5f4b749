// SPDX-License-Identifier: Apache-2.0
// layernorm(x, weight, bias, eps) -> out: (x - mean) / sqrt(variance + eps) * weight + bias.
// The variance is the mean square of the centred values. Which kernel runs, and in which order it
// adds, depends on the width of a row and on alignment alone:
//   up to 128 vectors   lanes of a warp share a row, several rows a block
//   up to 2048          a block a row, kept in registers between the steps
//   more, or unaligned  a block a row, read once for each step
#include "gpu.h"

#include "norm/pieces.cuh"

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

constexpr int kLayerNormGroupThreads = 256;

template <int kSize>
__device__ inline float layernorm_sum(const float (&value)[kSize]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum += value[i];
  return sum;
}

template <int kSize>
__device__ inline float layernorm_squares(const float (&value)[kSize], float mean) {
  float squares = 0;
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
__device__ inline void layernorm_finish(T* out, float (&value)[kSize], float mean, float scale,
                                        const Vec<T, kSize>& weights, const Vec<T, kSize>& biases) {
  float weight[kSize], bias[kSize];
  widen(weights, weight);
  widen(biases, bias);
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] = (value[i] - mean) * scale * weight[i] + bias[i];
  store(out, narrow<T>(value));
}

// kLanes threads share a row: lanes of a warp, or a block. Lanes without a row of their own go
// along with the last one.
template <class T, int kLanes, int kPieces>
__global__ void __launch_bounds__(kLanes > 32 ? kLanes : kLayerNormGroupThreads)
    layernorm_kernel(LayerNormArgs a) {
  constexpr int kSize = kFull<T>;
  __shared__ Shared<float, kMaxWarps> scratch, second_scratch;
  const uint32_t place =
      kLanes > 32 ? blockIdx.x
                  : blockIdx.x * (kLayerNormGroupThreads / kLanes) + threadIdx.x / kLanes;
  const uint32_t row = place < a.rows.rows ? place : a.rows.rows - 1;
  const Part<kLanes> part = {static_cast<int>(threadIdx.x % kLanes), a.width};
  const T* const x = a.rows.template row<const T>(0, row);
  T* const out = a.rows.template row<T>(1, row);
  prefetch_pieces<kPieces>(x, part);
  prefetch_pieces<kPieces>(static_cast<const T*>(a.weight), part);
  if (a.bias != nullptr) prefetch_pieces<kPieces>(static_cast<const T*>(a.bias), part);
  wait_for_previous();
  let_next_start();
  const auto in = load_pieces<kPieces>(x, part);
  const auto weight = load_pieces<kPieces>(static_cast<const T*>(a.weight), part);
  Pieces<T, kPieces> bias = {};
  if (a.bias != nullptr) bias = load_pieces<kPieces>(static_cast<const T*>(a.bias), part);
  const auto reduce = [](float value, Shared<float, kMaxWarps>& shared) {
    if constexpr (kLanes > 32) return reduce_block<kLanes>(value, 0.0f, Add{}, shared);
    return reduce_lanes<(kLanes > 32 ? 32 : kLanes)>(value, Add{});
  };
  float value[kSize];
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    widen(in[p], value);
    sum += layernorm_sum(value);
  }
  const float mean = reduce(sum, scratch) * a.inverse_width;
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    widen(in[p], value);
    const float of_piece = layernorm_squares(value, mean);
    squares += part.has(p) ? of_piece : 0.0f;
  }
  const float scale = layernorm_scale(a, reduce(squares, second_scratch));
  if (place != row) return;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    widen(in[p], value);
    if (part.has(p)) {
      layernorm_finish(out + static_cast<int64_t>(part.vector(p)) * kSize, value, mean, scale,
                       weight[p], bias[p]);
    }
  }
}

template <class T, int kSize>
__global__ void __launch_bounds__(kMaxThreads) layernorm_loop_kernel(LayerNormArgs a) {
  __shared__ Shared<float, kMaxWarps> scratch, second_scratch;
  wait_for_previous();
  let_next_start();
  const uint32_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  const T* const x = a.rows.template row<const T>(0, row);
  T* const out = a.rows.template row<T>(1, row);
  float value[kSize];
  float sum = 0;
#pragma unroll 4
  for (int vector = first; vector < a.width; vector += step) {
    widen(load<kSize>(x + static_cast<int64_t>(vector) * kSize), value);
    sum += layernorm_sum(value);
  }
  const float mean = reduce_block(sum, 0.0f, Add{}, scratch) * a.inverse_width;
  float squares = 0;
#pragma unroll 4
  for (int vector = first; vector < a.width; vector += step) {
    widen(load<kSize>(x + static_cast<int64_t>(vector) * kSize), value);
    squares += layernorm_squares(value, mean);
  }
  const float scale = layernorm_scale(a, reduce_block(squares, 0.0f, Add{}, second_scratch));
  for (int vector = first; vector < a.width; vector += step) {
    const int64_t column = static_cast<int64_t>(vector) * kSize;
    widen(load<kSize>(x + column), value);
    Vec<T, kSize> bias = {};
    if (a.bias != nullptr) bias = load<kSize>(static_cast<const T*>(a.bias) + column);
    layernorm_finish(out + column, value, mean, scale,
                     load<kSize>(static_cast<const T*>(a.weight) + column), bias);
  }
}

template <class T, int kLanes, int kPieces>
void launch_layernorm_held(const LayerNormArgs& a, Stream stream) {
  constexpr int kThreads = kLanes > 32 ? kLanes : kLayerNormGroupThreads;
  launch({"layernorm", stream, ceil_div(a.rows.rows, kThreads / kLanes), kThreads},
         layernorm_kernel<T, kLanes, kPieces>, a);
}

template <class T>
void launch_layernorm(LayerNormArgs a, bool aligned, Stream stream) {
  constexpr int kSize = kFull<T>;
  const auto loop = [&](auto kernel, int64_t threads) {
    const int64_t rounded = round_up(threads, kBlockUnit);
    launch({"layernorm", stream, a.rows.rows,
            static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads)},
           kernel, a);
  };
  if (!aligned) return loop(layernorm_loop_kernel<T, 1>, ceil_div(a.width, 8));
  a.width /= kSize;
  if (a.width <= 128) return launch_layernorm_held<T, 32, 4>(a, stream);
  if (a.width <= 256) return launch_layernorm_held<T, 128, 2>(a, stream);
  if (a.width <= 512) return launch_layernorm_held<T, 256, 2>(a, stream);
  if (a.width <= 768) return launch_layernorm_held<T, 256, 3>(a, stream);
  if (a.width <= 1024) return launch_layernorm_held<T, 256, 4>(a, stream);
  if (a.width <= 2048) return launch_layernorm_held<T, 512, 4>(a, stream);
  loop(layernorm_loop_kernel<T, kSize>, kMaxThreads);
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
