// SPDX-License-Identifier: Apache-2.0
// per_token_quant(x, int8) -> out_q, out_scale:
// out_q = round(x / out_scale), out_scale = amax(|row|) / top
#include "quantization/quantize.cuh"

namespace opmux::gpu {

struct TokenQuantRows {
  const void* x;
  int64_t x_stride;
  QuantizedRows out;
  FloatType type;
};

void launch_per_token_quant(const TokenQuantRows& in, Stream stream);

#if OPMUX_KERNEL

struct TokenQuantArgs {
  const void* x;
  int64_t x_stride;
  uint8_t* q;
  int64_t q_stride;
  float* scales;
  int64_t scale_stride;
  int width;  // vectors a row
};

constexpr int kTokenQuantThreads = 512;
constexpr int kTokenQuantPieces = 4;  // vectors that a thread holds

template <int kSize, class T>
__device__ inline Vec<T, kSize> read_vector(const TokenQuantArgs& a, int64_t row, int vector) {
  return load<kSize>(static_cast<const T*>(a.x) + row * a.x_stride +
                     static_cast<int64_t>(vector) * kSize);
}

template <class Q, class T, int kSize>
__device__ inline void write_vector(const TokenQuantArgs& a, int64_t row, int vector,
                                    const Vec<T, kSize>& in, float inverse) {
  float value[kSize];
  widen(in, value);
  store_quantized<Q>(a.q + row * a.q_stride + static_cast<int64_t>(vector) * kSize, value, inverse);
}

template <class T, int kSize>
__device__ inline float largest_of(float found, const Vec<T, kSize>& in) {
  float value[kSize];
  widen(in, value);
  return largest(found, value);
}

// A block a row, in registers between the maximum and the rounding. A thread without a vector of
// its own reads the last one: loads without branches are in flight together.
template <class T, class Q>
__global__ void __launch_bounds__(kTokenQuantThreads, 2) token_quant_kernel(TokenQuantArgs a) {
  constexpr int kSize = kFull<T>, kPieces = kTokenQuantPieces;
  __shared__ Shared<float, kMaxWarps> scratch;
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  Vec<T, kSize> in[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int vector = p * step + first;
    in[p] = read_vector<kSize, T>(a, row, vector < a.width ? vector : a.width - 1);
  }
  float found = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) found = largest_of(found, in[p]);
  const Scale scale = scale_of<Q>(reduce_block(found, 0.0f, Largest{}, scratch), false);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int vector = p * step + first;
    if (vector < a.width) write_vector<Q>(a, row, vector, in[p], scale.inverse);
  }
  if (first == 0) a.scales[row * a.scale_stride] = scale.value;
}

// Rows of any width and, with kSize 1, alignment: read twice.
template <class T, class Q, int kSize>
__global__ void __launch_bounds__(kMaxThreads) token_quant_loop_kernel(TokenQuantArgs a) {
  __shared__ Shared<float, kMaxWarps> scratch;
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x;
  const int step = static_cast<int>(blockDim.x), first = static_cast<int>(threadIdx.x);
  float found = 0;
  for (int vector = first; vector < a.width; vector += step) {
    found = largest_of(found, read_vector<kSize, T>(a, row, vector));
  }
  const Scale scale = scale_of<Q>(reduce_block(found, 0.0f, Largest{}, scratch), false);
  for (int vector = first; vector < a.width; vector += step) {
    write_vector<Q>(a, row, vector, read_vector<kSize, T>(a, row, vector), scale.inverse);
  }
  if (first == 0) a.scales[row * a.scale_stride] = scale.value;
}

template <class T, class Q>
void launch_token_quant(TokenQuantArgs a, int64_t rows, bool aligned, Stream stream) {
  const auto run = [&](auto kernel, int64_t threads) {
    const int64_t rounded = round_up(threads > 0 ? threads : 1, kBlockUnit);
    launch({"per_token_quant", stream, rows,
            static_cast<int>(rounded < kMaxThreads ? rounded : kMaxThreads)},
           kernel, a);
  };
  if (!aligned || a.width == 0) {
    return run(token_quant_loop_kernel<T, Q, 1>, ceil_div(a.width, 8));
  }
  a.width /= kFull<T>;
  const int64_t threads = ceil_div(a.width, kTokenQuantPieces);
  if (threads <= kTokenQuantThreads) return run(token_quant_kernel<T, Q>, threads);
  run(token_quant_loop_kernel<T, Q, kFull<T>>, kMaxThreads);
}

void launch_per_token_quant(const TokenQuantRows& in, Stream stream) {
  constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;
  const auto run = [&](auto type_tag, auto quantized_tag) {
    using T = typename decltype(type_tag)::Type;
    using Q = typename decltype(quantized_tag)::Type;
    const bool aligned = in.out.width % kFull<T> == 0 &&
                         aligned_to(in.x, in.x_stride, sizeof(T), kVectorBytes) &&
                         aligned_to(in.out.q, in.out.stride, 1, kFull<T>);
    for_tokens(in.out, kMaxRows, [&](int64_t first, const QuantizedRows& out) {
      const TokenQuantArgs a = {static_cast<const T*>(in.x) + first * in.x_stride,
                                in.x_stride,
                                static_cast<uint8_t*>(out.q),
                                out.stride,
                                static_cast<float*>(out.scales.data),
                                out.scales.stride,
                                static_cast<int>(out.width)};
      launch_token_quant<T, Q>(a, out.scales.tokens, aligned, stream);
    });
  };
  for_float_type(in.type, [&](auto type_tag) {
    for_quantized_type(in.out.int8, [&](auto quantized_tag) { run(type_tag, quantized_tag); });
  });
}
#endif

#if OPMUX_LAUNCHER
void per_token_quant(const Tensor& x, bool int8, Tensor out_q, Tensor out_scale) {
  const char* const op = "per_token_quant";
  check_same_device(op, x, out_q, out_scale);
  const FloatType type = float_type(op, x);
  check(x.dim() == 2, op, "x must have two dimensions");
  const QuantizedRows out = token_rows(op, out_q, out_scale, x.size(0), x.size(1), int8);
  if (x.size(0) == 0) return;
  const Place place(op, x);
  launch_per_token_quant({x.const_data_ptr(), row_stride(x), out, type}, place.stream());
}
OPMUX_OP(per_token_quant, per_token_quant);
#endif

}  // namespace opmux::gpu
