// SPDX-License-Identifier: Apache-2.0
// What the launchers of this family share: rows of probabilities and one value per row.
#pragma once

#include "kernel.h"

#if OPMUX_LAUNCHER

#include <algorithm>
#include <memory>
#include <vector>

namespace opmux::cpu {
namespace {

struct Probs {
  FloatType type;
  int64_t rows, size;
  const char* data;
  int64_t row_bytes;  // distance of two rows

  const void* row(int64_t b) const { return data + b * row_bytes; }
};

inline Probs check_probs(const char* op, const Tensor& probs) {
  check(probs.dim() == 2, op, "probs must have two dimensions");
  check_last_dim_contiguous(op, probs);
  return {float_type(op, probs), probs.size(0), probs.size(1),
          static_cast<const char*>(probs.const_data_ptr()),
          probs.stride(0) * static_cast<int64_t>(probs.element_size())};
}

inline void check_renormed(const char* op, const Tensor& probs, const Tensor& out) {
  check_same_device(op, probs, out);
  check_same_shape(op, probs, out);
  check_last_dim_contiguous(op, out);
  check_float32(op, out);
}

inline void check_tokens(const char* op, const Tensor& probs, const Tensor& out) {
  check_same_device(op, probs, out);
  check(out.dim() == 1 && out.size(0) == probs.size(0), op, "out must have one token per row");
  check_last_dim_contiguous(op, out);
  check(dtype_of(out) == aoti_torch_dtype_int32(), op, "out must be int32");
  check(probs.size(1) <= INT32_MAX, op, "a row must have fewer than 2**31 tokens");
}

template <class To, class From>
std::vector<To> copy_values(const Tensor& values) {
  const From* from = static_cast<const From*>(values.const_data_ptr());
  std::vector<To> copy(static_cast<size_t>(values.size(0)));
  for (size_t b = 0; b < copy.size(); ++b) {
    copy[b] = static_cast<To>(from[static_cast<int64_t>(b) * values.stride(0)]);
  }
  return copy;
}

inline void check_per_row(const char* op, const Tensor& probs, const Tensor& values) {
  check_same_device(op, probs, values);
  check(values.dim() == 1 && values.size(0) == probs.size(0), op, "needs one value per row");
}

inline std::vector<double> per_row(const char* op, const Tensor& probs, const Tensor& values) {
  check_per_row(op, probs, values);
  check_float32(op, values);
  return copy_values<double, float>(values);
}

inline std::vector<double> per_row(const char* op, const Tensor& probs,
                                   const std::optional<Tensor>& values, double scalar) {
  if (values.has_value()) return per_row(op, probs, *values);
  return std::vector<double>(static_cast<size_t>(probs.size(0)), scalar);
}

inline std::vector<int64_t> per_row(const char* op, const Tensor& probs,
                                    const std::optional<Tensor>& values, int64_t scalar) {
  if (!values.has_value()) {
    return std::vector<int64_t>(static_cast<size_t>(probs.size(0)), scalar);
  }
  check_per_row(op, probs, *values);
  return index_type(op, *values) == IndexType::kInt32 ? copy_values<int64_t, int32_t>(*values)
                                                      : copy_values<int64_t, int64_t>(*values);
}

// f(b, scratch) for every row b, each task with `scratch_bytes` of its own, aligned to 64 bytes.
// They are allocated here, before any row is written: nothing may throw in a task.
template <class F>
void for_rows(const Probs& probs, int64_t scratch_bytes, const F& f) {
  constexpr int64_t kPasses = 16;  // a row costs about as much as moving it this often
  const int64_t row_bytes = probs.size * 4 * kPasses;
  int64_t tasks = std::min<int64_t>(probs.rows, torch::stable::get_num_threads());
  tasks = std::min(tasks, probs.rows * row_bytes / kBytesPerTask);
  tasks = std::max<int64_t>(tasks, probs.rows > 0 ? 1 : 0);
  constexpr int64_t kAlign = 64;
  const std::unique_ptr<char[]> memory(
      new char[static_cast<size_t>(tasks * scratch_bytes + kAlign)]);
  char* scratch = memory.get() + (kAlign - reinterpret_cast<uintptr_t>(memory.get()) % kAlign);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t last = (task + 1) * probs.rows / tasks;
      for (int64_t b = task * probs.rows / tasks; b < last; ++b) {
        f(b, static_cast<void*>(scratch + task * scratch_bytes));
      }
    }
  };
  if (tasks == 1) {
    run(0, 1);
  } else if (tasks > 1) {
    torch::stable::parallel_for(0, tasks, 1, run);
  }
}

}  // namespace
}  // namespace opmux::cpu

#endif
