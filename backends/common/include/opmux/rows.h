// SPDX-License-Identifier: Apache-2.0
// Walks the rows (last dimensions) of tensors together, whatever the strides of their leading
// dimensions, without a copy: dimensions that lie end to end in every tensor are one loop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "opmux/check.h"
#include "opmux/plane.h"

namespace opmux {

struct Operand {
  const Tensor& tensor;
  void* data;
};

// A read-only pointer that does not materialise a lazily cloned tensor. It loses its const here
// so that operands fit one array; a kernel's signature gives it back.
inline Operand reads(const Tensor& t) { return {t, const_cast<void*>(t.const_data_ptr())}; }
inline Operand writes(const Tensor& t) { return {t, t.mutable_data_ptr()}; }

// Rows at a constant distance. Strides count elements of the operand.
template <size_t N>
struct RowSpan {
  void* data[N];
  int64_t stride[N];
  int64_t rows;
};

template <size_t N>
class Rows {
 public:
  // All leading sizes must agree; the last sizes may differ and must be contiguous. Dimensions
  // before `first_dim` are left out: the caller walks them.
  Rows(const char* op, const Operand (&operands)[N], int64_t first_dim = 0) {
    const Tensor& first = operands[0].tensor;
    const int64_t dims = first.dim();
    check(dims >= 1 && dims <= kMaxDims, op, "tensor must have 1 to 64 dimensions");
    for (size_t k = 0; k < N; ++k) {
      const Tensor& t = operands[k].tensor;
      check(t.dim() == dims, op, "tensors must have the same number of dimensions");
      check_last_dim_contiguous(op, t);
      base_[k] = static_cast<char*>(operands[k].data);
      item_[k] = static_cast<int64_t>(t.element_size());
      width_[k] = dims > first_dim ? t.size(dims - 1) : 1;
    }
    for (int64_t i = dims - 2; i >= first_dim; --i) {
      int64_t strides[N];
      for (size_t k = 0; k < N; ++k) {
        const Tensor& t = operands[k].tensor;
        check(t.size(i) == first.size(i), op, "leading dimensions must agree");
        strides[k] = t.stride(i);
      }
      append(first.size(i), strides);
    }
    if (loops_ == 0) append_single();
  }

  // Makes one long row of rows that lie end to end in every operand.
  void join_dense_rows() {
    for (size_t k = 0; k < N; ++k) {
      if (loop_[0].size > 1 && loop_[0].stride[k] != width_[k]) return;
    }
    for (size_t k = 0; k < N; ++k) width_[k] *= loop_[0].size;
    total_ = 1;
    for (int i = 1; i < loops_; ++i) {
      loop_[i - 1] = loop_[i];
      total_ *= loop_[i].size;
    }
    if (--loops_ == 0) append_single();
  }

  // Elements in a row of operand k.
  int64_t width(size_t k) const { return width_[k]; }

  int64_t size() const { return total_; }

  // Calls f(RowSpan) for consecutive pieces of rows [begin, end), in row-major order.
  template <class F>
  void for_spans(int64_t begin, int64_t end, const F& f) const {
    while (begin < end) {
      RowSpan<N> span;
      int64_t rest = begin;
      const int64_t inner = rest % loop_[0].size;
      rest /= loop_[0].size;
      for (size_t k = 0; k < N; ++k) span.stride[k] = loop_[0].stride[k];
      int64_t offset[N];
      for (size_t k = 0; k < N; ++k) offset[k] = inner * loop_[0].stride[k];
      for (int i = 1; i < loops_; ++i) {
        const int64_t index = rest % loop_[i].size;
        rest /= loop_[i].size;
        for (size_t k = 0; k < N; ++k) offset[k] += index * loop_[i].stride[k];
      }
      for (size_t k = 0; k < N; ++k) span.data[k] = base_[k] + offset[k] * item_[k];
      const int64_t left = loop_[0].size - inner;
      span.rows = left < end - begin ? left : end - begin;
      f(span);
      begin += span.rows;
    }
  }

  // Calls f(Plane) for all rows, in as few planes as the strides allow: one for up to two loops.
  template <class F>
  void for_planes(const F& f) const {
    if (total_ == 0) return;
    Plane<N> plane;
    plane.inner_rows = loop_[0].size;
    plane.rows = loop_[0].size * (loops_ > 1 ? loop_[1].size : 1);
    for (size_t k = 0; k < N; ++k) {
      plane.inner_stride[k] = loop_[0].stride[k];
      plane.outer_stride[k] = loops_ > 1 ? loop_[1].stride[k] : 0;
    }
    for (int64_t i = 0; i < total_ / plane.rows; ++i) {
      int64_t rest = i;
      for (size_t k = 0; k < N; ++k) plane.data[k] = base_[k];
      for (int d = 2; d < loops_; ++d) {
        const int64_t index = rest % loop_[d].size;
        rest /= loop_[d].size;
        for (size_t k = 0; k < N; ++k) {
          plane.data[k] = static_cast<char*>(plane.data[k]) + index * loop_[d].stride[k] * item_[k];
        }
      }
      f(plane);
    }
  }

 private:
  static constexpr int64_t kMaxDims = 64;  // torch's own limit for an iterator

  struct Loop {
    int64_t size;
    int64_t stride[N];
  };

  // Adds the next outer dimension, merged into the loop inside it where every tensor allows.
  void append(int64_t size, const int64_t (&strides)[N]) {
    total_ *= size;
    if (size == 1) return;
    if (loops_ > 0) {
      Loop& inner = loop_[loops_ - 1];
      bool joins = true;
      for (size_t k = 0; k < N; ++k) joins &= strides[k] == inner.stride[k] * inner.size;
      if (joins) {
        inner.size *= size;
        return;
      }
    }
    Loop& loop = loop_[loops_++];
    loop.size = size;
    for (size_t k = 0; k < N; ++k) loop.stride[k] = strides[k];
  }

  void append_single() {  // a single row, or none
    for (size_t k = 0; k < N; ++k) loop_[0].stride[k] = 0;
    loop_[0].size = 1;
    loops_ = 1;
  }

  char* base_[N];
  int64_t item_[N];
  int64_t width_[N];
  Loop loop_[kMaxDims];
  int loops_ = 0;  // innermost first
  int64_t total_ = 1;
};

}  // namespace opmux
