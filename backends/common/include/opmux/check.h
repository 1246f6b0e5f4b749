// SPDX-License-Identifier: Apache-2.0
// Checks that keep memory safe. Core has told the user about mistakes before; these messages are
// what is left when a native op is called directly. All run before the first write.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace opmux {

using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* op, const char* rule) {
  throw std::runtime_error(std::string(op) + ": " + rule);
}

inline void check(bool holds, const char* op, const char* rule) {
  if (__builtin_expect(!holds, 0)) fail(op, rule);
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = -1;
  if (aoti_torch_get_dtype(t.get(), &dtype) != 0) fail("opmux", "tensor without a dtype");
  return dtype;
}

inline int32_t device_of(const Tensor& t) {
  int32_t device = -1;
  if (aoti_torch_get_device_type(t.get(), &device) != 0) fail("opmux", "tensor without a device");
  return device;
}

template <class... Rest>
void check_same_device(const char* op, const Tensor& first, const Rest&... rest) {
  const bool same = ((device_of(rest) == device_of(first) &&
                      rest.get_device_index() == first.get_device_index()) &&
                     ...);
  check(same, op, "tensors must be on one device");
}

template <class... Rest>
void check_same_dtype(const char* op, const Tensor& first, const Rest&... rest) {
  check(((dtype_of(rest) == dtype_of(first)) && ...), op, "tensors must have one dtype");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline void check_same_shape(const char* op, const Tensor& a, const Tensor& b) {
  check(same_shape(a, b), op, "tensors must have one shape");
}

// The stride of a dimension of one element is never used, so any value will do.
inline void check_last_dim_contiguous(const char* op, const Tensor& t) {
  check(t.dim() >= 1, op, "tensor must have a dimension");
  const int64_t last = t.dim() - 1;
  check(t.size(last) <= 1 || t.stride(last) == 1, op, "last dimension must be contiguous");
}

}  // namespace opmux
