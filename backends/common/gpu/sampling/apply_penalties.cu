// SPDX-License-Identifier: Apache-2.0
// apply_penalties(logits, token_counts, repetition_penalty, frequency_penalty, presence_penalty,
// prompt_mask), in place: lowers the logits of tokens that were generated or are in the prompt
#include "gpu.h"

#if OPMUX_KERNEL
#include "rows.cuh"
#include "vec.cuh"
#endif

namespace opmux::gpu {

// One for all rows, or one for each.
struct Penalty {
  const float* per_row;
  float value;
};
struct Penalties {
  void* logits;  // (rows, width)
  const int32_t* counts;
  const uint8_t* prompt;  // nullptr: none
  int64_t logits_stride, counts_stride, prompt_stride;
  int64_t rows, width;
  Penalty repetition, frequency, presence;
  FloatType type;
};

void launch_apply_penalties(const Penalties& a, Stream stream);

#if OPMUX_KERNEL

constexpr int kPenaltyThreads = 256;

__device__ inline float penalty_of(const Penalty& penalty, int64_t row) {
  return penalty.per_row == nullptr ? penalty.value : penalty.per_row[row];
}

// Few tokens of a vocabulary were used: where a vector holds none, its logits are not even read.
template <class T, int kSize, int kUnroll>
__global__ void __launch_bounds__(kPenaltyThreads)
    apply_penalties_kernel(Penalties a, Divider width, int64_t first_row, uint32_t vectors) {
  constexpr int kPart = kSize < 4 ? kSize : 4;  // counts in a vector
  wait_for_previous();
  let_next_start();
  const uint32_t first = blockIdx.x * (kPenaltyThreads * kUnroll) + threadIdx.x;
  Split at[kUnroll];
  Vec<int32_t, kPart> counts[kUnroll][kSize / kPart];
  Vec<uint8_t, kSize> prompt[kUnroll] = {};
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t index = first + u * kPenaltyThreads;
    at[u] = width.split(index < vectors ? index : vectors - 1);
    const int64_t row = first_row + at[u].quotient;
    const int64_t column = static_cast<int64_t>(at[u].remainder) * kSize;
#pragma unroll
    for (int p = 0; p < kSize / kPart; ++p) {
      counts[u][p] = load<kPart>(a.counts + row * a.counts_stride + column + p * kPart);
    }
    if (a.prompt != nullptr) {
      prompt[u] = load<kSize>(a.prompt + row * a.prompt_stride + column);
    }
  }
  T* logits[kUnroll];
  Vec<T, kSize> before[kUnroll] = {};
  bool used[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    used[u] = false;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      used[u] |= counts[u][i / kPart].item[i % kPart] > 0 || prompt[u].item[i] != 0;
    }
    used[u] &= first + u * kPenaltyThreads < vectors;
    logits[u] = static_cast<T*>(a.logits) + (first_row + at[u].quotient) * a.logits_stride +
                static_cast<int64_t>(at[u].remainder) * kSize;
    if (used[u]) before[u] = load<kSize>(logits[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (!used[u]) continue;
    const int64_t row = first_row + at[u].quotient;
    const float repetition = penalty_of(a.repetition, row);
    const float frequency = penalty_of(a.frequency, row);
    const float presence = penalty_of(a.presence, row);
    float value[kSize];
    widen(before[u], value);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int32_t count = counts[u][i / kPart].item[i % kPart];
      if (count > 0 || prompt[u].item[i] != 0) {
        value[i] = value[i] > 0 ? value[i] / repetition : value[i] * repetition;
      }
      if (count > 0) value[i] -= frequency * static_cast<float>(count) + presence;
    }
    Vec<T, kSize> after = narrow<T>(value);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {  // the others keep their bits, also those of a NaN
      const bool changed = counts[u][i / kPart].item[i % kPart] > 0 || prompt[u].item[i] != 0;
      after.item[i] = changed ? after.item[i] : before[u].item[i];
    }
    store(logits[u], after);
  }
}

template <class T, int kSize>
void launch_penalties(const Penalties& a, Stream stream) {
  const int64_t width = a.width / kSize;
  const int64_t most = ((int64_t{1} << 31) - 1) / width;  // rows that 31 bits can count
  for (int64_t first = 0; first < a.rows; first += most) {
    const int64_t vectors = (a.rows - first < most ? a.rows - first : most) * width;
    const auto run = [&](auto kernel, int unroll) {
      launch(
          {"apply_penalties", stream, ceil_div(vectors, kPenaltyThreads * unroll), kPenaltyThreads},
          kernel, a, Divider(width), first, static_cast<uint32_t>(vectors));
    };
    if (vectors >= 2 * resident_threads()) {
      run(apply_penalties_kernel<T, kSize, 2>, 2);
    } else {
      run(apply_penalties_kernel<T, kSize, 1>, 1);
    }
  }
}

void launch_apply_penalties(const Penalties& a, Stream stream) {
  for_float_type(a.type, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kSize = kFull<T>;
    const uint64_t counts = static_cast<uint64_t>(a.width) | a.logits_stride | a.counts_stride |
                            (a.prompt != nullptr ? a.prompt_stride : 0);
    const uintptr_t data =
        reinterpret_cast<uintptr_t>(a.logits) | reinterpret_cast<uintptr_t>(a.counts);
    const bool aligned = counts % kSize == 0 && data % kVectorBytes == 0 &&
                         reinterpret_cast<uintptr_t>(a.prompt) % kSize == 0;
    if (aligned) {
      launch_penalties<T, kSize>(a, stream);
    } else {
      launch_penalties<T, 1>(a, stream);
    }
  });
}

#endif

#if OPMUX_LAUNCHER

Penalty penalty_from(const char* op, const Tensor& logits, const std::optional<Tensor>& per_row,
                     double value) {
  if (!per_row.has_value()) return {nullptr, static_cast<float>(value)};
  check_same_device(op, logits, *per_row);
  check_float32(op, *per_row);
  check(per_row->dim() == 1 && per_row->size(0) == logits.size(0), op,
        "a penalty must have one element per row");
  check_last_dim_contiguous(op, *per_row);
  return {static_cast<const float*>(per_row->const_data_ptr()), 0};
}

void apply_penalties(Tensor logits, const Tensor& token_counts,
                     const std::optional<Tensor>& repetition_penalty_per_row,
                     double repetition_penalty,
                     const std::optional<Tensor>& frequency_penalty_per_row,
                     double frequency_penalty,
                     const std::optional<Tensor>& presence_penalty_per_row, double presence_penalty,
                     const std::optional<Tensor>& prompt_mask) {
  constexpr const char* kOp = "apply_penalties";
  check_same_device(kOp, logits, token_counts);
  const FloatType type = float_type(kOp, logits);
  check(logits.dim() == 2, kOp, "logits must have two dimensions");
  check_same_shape(kOp, logits, token_counts);
  check(dtype_of(token_counts) == aoti_torch_dtype_int32(), kOp, "token_counts must be int32");
  check_last_dim_contiguous(kOp, logits);
  check_last_dim_contiguous(kOp, token_counts);
  check_row(kOp, logits.size(1));
  const auto stride = [](const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : 0; };
  Penalties a = {nullptr,
                 static_cast<const int32_t*>(token_counts.const_data_ptr()),
                 nullptr,
                 stride(logits),
                 stride(token_counts),
                 0,
                 logits.size(0),
                 logits.size(1),
                 penalty_from(kOp, logits, repetition_penalty_per_row, repetition_penalty),
                 penalty_from(kOp, logits, frequency_penalty_per_row, frequency_penalty),
                 penalty_from(kOp, logits, presence_penalty_per_row, presence_penalty),
                 type};
  if (prompt_mask.has_value()) {
    check_same_device(kOp, logits, *prompt_mask);
    check(dtype_of(*prompt_mask) == aoti_torch_dtype_bool(), kOp, "prompt_mask must be bool");
    check_same_shape(kOp, logits, *prompt_mask);
    check_last_dim_contiguous(kOp, *prompt_mask);
    a.prompt = static_cast<const uint8_t*>(prompt_mask->const_data_ptr());
    a.prompt_stride = stride(*prompt_mask);
  }
  if (a.rows * a.width == 0) return;
  a.logits = logits.mutable_data_ptr();
  const Place place(kOp, logits);
  launch_apply_penalties(a, place.stream());
}
OPMUX_OP(apply_penalties, apply_penalties);
#endif

}  // namespace opmux::gpu
