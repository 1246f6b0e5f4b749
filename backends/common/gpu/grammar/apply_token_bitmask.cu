// SPDX-License-Identifier: Apache-2.0
// apply_token_bitmask(logits, bitmask, indices): in place, -inf where the bit of a token is 0.
// Logits are moved as bits and read only where a vector has both kinds of token.
#include "gpu.h"
#include "indices.h"

namespace opmux::gpu {

struct Masking {
  void* logits;
  const int32_t* words;
  int64_t logits_stride, words_stride;
  Indices indices;  // the rows to mask; data null: all
  int64_t rows;     // to mask
  int64_t batch;
  int64_t size;
  FloatType type;
};
void launch_apply_token_bitmask(const Masking& a, Stream stream);

}  // namespace opmux::gpu

#if OPMUX_KERNEL

#include "rows.cuh"
#include "vec.cuh"

namespace opmux::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;

template <class T, int kSize>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(Masking a, Divider width, uint32_t vectors, int64_t first_row, T minus_inf) {
  wait_for_previous();
  let_next_start();
  constexpr uint32_t kAll = (1u << kSize) - 1;
  const uint32_t first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
  uint32_t allowed[kUnroll];
  T* logits[kUnroll];
  int left[kUnroll];  // logits from the vector's start to the end of its row
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t vector = first + u * kThreads;
    const Split at = width.split(vector < vectors ? vector : vectors - 1);
    const int64_t i = first_row + at.quotient;
    const int64_t row = a.indices.data == nullptr ? i : a.indices.at(i);
    const bool inside = vector < vectors && row >= 0 && row < a.batch;
    const int64_t column = static_cast<int64_t>(at.remainder) * kSize;
    allowed[u] = kAll;
    if (inside) {
      const uint32_t word = static_cast<uint32_t>(a.words[row * a.words_stride + column / 32]);
      allowed[u] = word >> (column % 32) & kAll;
    }
    logits[u] = static_cast<T*>(a.logits) + row * a.logits_stride + column;
    left[u] = a.size - column < kSize ? static_cast<int>(a.size - column) : kSize;
  }
  Vec<T, kSize> value[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const bool mixed = allowed[u] != kAll && allowed[u] != 0;
    value[u] = load_if<kSize>(mixed && left[u] == kSize, logits[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (allowed[u] == kAll) continue;
    if (left[u] < kSize) {
      for (int i = 0; i < left[u]; ++i) {
        if ((allowed[u] >> i & 1) == 0) logits[u][i] = minus_inf;
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if ((allowed[u] >> i & 1) == 0) value[u].item[i] = minus_inf;
    }
    store(logits[u], value[u]);
  }
}

template <class T, int kSize>
void mask_rows(const Masking& a, T minus_inf, Stream stream) {
  const int64_t width = ceil_div(a.size, kSize);
  const int64_t step = ((int64_t{1} << 31) - 1) / width;  // the kernel counts in 31 bits
  for (int64_t row = 0; row < a.rows; row += step) {
    const int64_t vectors = (a.rows - row < step ? a.rows - row : step) * width;
    launch({"apply_token_bitmask", stream, ceil_div(vectors, kThreads * kUnroll), kThreads},
           mask_kernel<T, kSize>, a, Divider(width), static_cast<uint32_t>(vectors), row,
           minus_inf);
  }
}

template <class T>
void mask_rows(const Masking& a, T minus_inf, Stream stream) {
  const uint64_t all = reinterpret_cast<uintptr_t>(a.logits) |
                       static_cast<uint64_t>(a.logits_stride * static_cast<int64_t>(sizeof(T)));
  if (all % kVectorBytes == 0) return mask_rows<T, kFull<T>>(a, minus_inf, stream);
  mask_rows<T, 1>(a, minus_inf, stream);
}

}  // namespace

void launch_apply_token_bitmask(const Masking& a, Stream stream) {
  if (a.type == FloatType::kFloat32) return mask_rows<uint32_t>(a, 0xff800000, stream);
  const bool is_bfloat16 = a.type == FloatType::kBFloat16;
  mask_rows<uint16_t>(a, is_bfloat16 ? uint16_t{0xff80} : uint16_t{0xfc00}, stream);
}

}  // namespace opmux::gpu

#endif

#if OPMUX_LAUNCHER

namespace opmux::gpu {
namespace {

void apply_token_bitmask(Tensor logits, const Tensor& bitmask,
                         const std::optional<Tensor>& indices) {
  constexpr const char* kOp = "apply_token_bitmask";
  check_same_device(kOp, logits, bitmask);
  check(logits.dim() == 2 && bitmask.dim() == 2, kOp, "logits and bitmask have two dimensions");
  check_last_dim_contiguous(kOp, logits);
  check_last_dim_contiguous(kOp, bitmask);
  Masking a = {};
  a.type = float_type(kOp, logits);
  a.batch = a.rows = logits.size(0);
  a.size = logits.size(1);
  check_row(kOp, a.size);
  check(dtype_of(bitmask) == aoti_torch_dtype_int32(), kOp, "bitmask must be int32");
  check(bitmask.size(0) == a.batch && bitmask.size(1) >= (a.size + 31) / 32, kOp,
        "bitmask must have a bit for each logit");
  if (indices.has_value()) {
    check_same_device(kOp, logits, *indices);
    check(indices->dim() == 1, kOp, "indices must have one dimension");
    a.rows = indices->size(0);
    a.indices = indices_of(kOp, *indices, a.rows);
  }
  if (a.rows * a.batch * a.size == 0) return;
  a.logits = logits.mutable_data_ptr();
  a.words = static_cast<const int32_t*>(bitmask.const_data_ptr());
  a.logits_stride = logits.stride(0);
  a.words_stride = bitmask.stride(0);
  const Place place(kOp, logits);
  launch_apply_token_bitmask(a, place.stream());
}
OPMUX_OP(apply_token_bitmask, apply_token_bitmask);

}  // namespace
}  // namespace opmux::gpu

#endif
