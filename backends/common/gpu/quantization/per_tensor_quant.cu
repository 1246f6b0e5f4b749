// SPDX-License-Identifier: Apache-2.0
// per_tensor_quant(x, scale, int8) -> out_q, out_scale: out_q = round(x / out_scale), where
// out_scale is the given scale, or amax(|x|) / top
#include "quantization/quantize.cuh"

#if OPMUX_KERNEL
#include "rows.cuh"
#endif

namespace opmux::gpu {

// A block leaves its maximum in a workspace, which every block that quantises reads whole: the
// blocks need no order among them, and nothing has to be zeroed before.
constexpr int64_t kMaxPartials = 1024;

struct TensorQuantRows {
  const void* x;
  int64_t x_stride;
  void* q;
  int64_t q_stride;
  int64_t tokens, width;
  const float* scale;  // nullptr: find it, with the help of
  float* partials;     // of kMaxPartials
  float* out_scale;
  bool int8;
  FloatType type;
};

void launch_per_tensor_quant(const TensorQuantRows& in, Stream stream);

#if OPMUX_KERNEL

struct TensorQuantArgs {
  const void* x;
  int64_t x_stride;
  uint8_t* q;
  int64_t q_stride;
  Divider width;     // vectors a row
  uint32_t vectors;  // of all rows
  const float* scale;
  float* partials;
  int partial_count;
  float* out_scale;
};

constexpr int kTensorQuantThreads = 512;
constexpr int kAmaxVectors = 4, kQuantVectors = 2;  // that a thread has in flight

// Reads kCount vectors, kTensorQuantThreads apart; the last one for those behind it.
template <class T, int kSize, int kCount>
__device__ inline void read_vectors(const TensorQuantArgs& a, uint32_t first,
                                    Vec<T, kSize> (&in)[kCount]) {
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const uint32_t vector = first + u * kTensorQuantThreads;
    const Split at = a.width.split(vector < a.vectors ? vector : a.vectors - 1);
    in[u] = load<kSize>(static_cast<const T*>(a.x) + at.quotient * a.x_stride +
                        static_cast<int64_t>(at.remainder) * kSize);
  }
}

// kFirst: of the first run of rows. Later ones add to what it left.
template <class T, int kSize, bool kFirst>
__global__ void __launch_bounds__(kTensorQuantThreads) tensor_amax_kernel(TensorQuantArgs a) {
  constexpr uint32_t kStep = kTensorQuantThreads * kAmaxVectors;
  __shared__ Shared<float, kMaxWarps> scratch;
  wait_for_previous();
  let_next_start();
  float found = 0;
  for (uint32_t first = blockIdx.x * kStep; first < a.vectors; first += gridDim.x * kStep) {
    Vec<T, kSize> in[kAmaxVectors];
    read_vectors(a, first + threadIdx.x, in);
#pragma unroll
    for (int u = 0; u < kAmaxVectors; ++u) {
      float value[kSize];
      widen(in[u], value);
      found = largest(found, value);
    }
  }
  found = reduce_block(found, 0.0f, Largest{}, scratch);
  if (threadIdx.x != 0) return;
  a.partials[blockIdx.x] = kFirst ? found : fmaxf(found, a.partials[blockIdx.x]);
}

template <class T, class Q, int kSize>
__global__ void __launch_bounds__(kTensorQuantThreads) tensor_quant_kernel(TensorQuantArgs a) {
  constexpr uint32_t kStep = kTensorQuantThreads * kQuantVectors;
  __shared__ Shared<float, kMaxWarps> scratch;
  wait_for_previous();
  let_next_start();
  // From the end, which the search for the maximum read last.
  const uint32_t first = (gridDim.x - 1 - blockIdx.x) * kStep + threadIdx.x;
  Vec<T, kSize> in[kQuantVectors];
  if (a.vectors > 0) read_vectors(a, first, in);
  Scale scale;
  if (a.scale != nullptr) {
    scale.value = *a.scale;
    scale.inverse = 1.0f / scale.value;
  } else {
    float found = 0;
    for (int i = static_cast<int>(threadIdx.x); i < a.partial_count; i += kTensorQuantThreads) {
      found = fmaxf(found, a.partials[i]);
    }
    scale = scale_of<Q>(reduce_block(found, 0.0f, Largest{}, scratch), false);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.out_scale = scale.value;
#pragma unroll
  for (int u = 0; u < kQuantVectors; ++u) {
    const uint32_t vector = first + u * kTensorQuantThreads;
    if (vector >= a.vectors) break;
    const Split at = a.width.split(vector);
    float value[kSize];
    widen(in[u], value);
    store_quantized<Q>(a.q + at.quotient * a.q_stride + static_cast<int64_t>(at.remainder) * kSize,
                       value, scale.inverse);
  }
}

template <class T, int kSize>
void launch_per_tensor_quant(const TensorQuantRows& in, Stream stream) {
  const char* const op = "per_tensor_quant";
  const int64_t resident = resident_threads() / kTensorQuantThreads;
  const int64_t most = resident < kMaxPartials ? resident : kMaxPartials;
  const int64_t width = in.width / kSize;
  // Fewer than 2^31 vectors at a time: what a step reaches beyond them still fits 32 bits.
  const int64_t limit = width > 0 ? ((int64_t{1} << 31) - 1) / width : 1;
  const int64_t first_rows = in.tokens < limit ? in.tokens : limit;
  const int64_t needed = ceil_div(first_rows * width, kTensorQuantThreads * kAmaxVectors);
  const int64_t blocks = needed < 1 ? 1 : needed < most ? needed : most;
  const auto for_runs = [&](auto f) {
    int64_t row = 0;
    do {  // once without rows: the scale is written
      const int64_t left = in.tokens - row, rows = left < limit ? left : limit;
      const TensorQuantArgs a = {static_cast<const T*>(in.x) + row * in.x_stride,
                                 in.x_stride,
                                 static_cast<uint8_t*>(in.q) + row * in.q_stride,
                                 in.q_stride,
                                 Divider(width > 0 ? width : 1),
                                 static_cast<uint32_t>(rows * width),
                                 in.scale,
                                 in.partials,
                                 static_cast<int>(blocks),
                                 in.out_scale};
      f(row, a);
      row += limit;
    } while (row < in.tokens);
  };
  if (in.scale == nullptr) {
    for_runs([&](int64_t row, const TensorQuantArgs& a) {
      const Launch at = {op, stream, blocks, kTensorQuantThreads};
      if (row == 0) return launch(at, tensor_amax_kernel<T, kSize, true>, a);
      launch(at, tensor_amax_kernel<T, kSize, false>, a);
    });
  }
  for_runs([&](int64_t, const TensorQuantArgs& a) {
    const int64_t steps = ceil_div(a.vectors, kTensorQuantThreads * kQuantVectors);
    for_quantized_type(in.int8, [&](auto tag) {
      launch({op, stream, steps > 0 ? steps : 1, kTensorQuantThreads},
             tensor_quant_kernel<T, typename decltype(tag)::Type, kSize>, a);
    });
  });
}

void launch_per_tensor_quant(const TensorQuantRows& in, Stream stream) {
  for_float_type(in.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kSize = kFull<T>;
    const bool aligned = in.width % kSize == 0 &&
                         aligned_to(in.x, in.x_stride, sizeof(T), kVectorBytes) &&
                         aligned_to(in.q, in.q_stride, 1, kSize);
    if (aligned) return launch_per_tensor_quant<T, kSize>(in, stream);
    launch_per_tensor_quant<T, 1>(in, stream);
  });
}
#endif

#if OPMUX_LAUNCHER
// Of the allocator that belongs to the stream, so that a captured graph may use it.
Tensor new_partials(const char* op, const Tensor& x) {
  const int64_t size = kMaxPartials, stride = 1;
  AtenTensorHandle made = nullptr;
  check(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_float32(), device_of(x),
                                 x.get_device_index(), &made) == 0,
        op, "no memory for a workspace");
  return Tensor(made);
}

void per_tensor_quant(const Tensor& x, const std::optional<Tensor>& scale, bool int8, Tensor out_q,
                      Tensor out_scale) {
  const char* const op = "per_tensor_quant";
  check_same_device(op, x, out_q, out_scale);
  const FloatType type = float_type(op, x);
  check(x.dim() == 2, op, "x must have two dimensions");
  check_out_q(op, out_q, x.size(0), x.size(1), int8);
  check_float32(op, out_scale);
  check(out_scale.dim() == 1 && out_scale.size(0) == 1, op, "out_scale must have shape (1,)");
  if (scale.has_value()) {
    check_same_device(op, x, *scale);
    check_float32(op, *scale);
    check(scale->dim() == 1 && scale->size(0) == 1, op, "scale must have shape (1,)");
  }
  const Place place(op, x);
  std::optional<Tensor> partials;
  if (!scale.has_value()) partials = new_partials(op, x);
  launch_per_tensor_quant(
      {x.const_data_ptr(), row_stride(x), out_q.mutable_data_ptr(), row_stride(out_q), x.size(0),
       x.size(1), scale.has_value() ? static_cast<const float*>(scale->const_data_ptr()) : nullptr,
       partials.has_value() ? static_cast<float*>(partials->mutable_data_ptr()) : nullptr,
       static_cast<float*>(out_scale.mutable_data_ptr()), int8, type},
      place.stream());
}
OPMUX_OP(per_tensor_quant, per_tensor_quant);
#endif

}  // namespace opmux::gpu
