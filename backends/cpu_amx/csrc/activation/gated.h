// SPDX-License-Identifier: Apache-2.0
// What the gated activations share: out = f(x[..., :d], x[..., d:]).
#pragma once

#include "elementwise.h"

namespace opmux::cpu {
namespace {

struct GatedRows {
  const void* x;
  int64_t x_stride;  // elements between rows of 2 * d
  void* out;
  int64_t out_stride;  // elements between rows of d
  int64_t d;
  int64_t rows;
  bool stream;  // out does not fit the caches
};
using GatedKernel = void(const GatedRows&);

#if OPMUX_KERNEL

template <class T, class F>
OPMUX_INLINE void map_gated(const GatedRows& a, const F& f) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* gate = static_cast<const T*>(a.x) + r * a.x_stride;
    T* out = static_cast<T*>(a.out) + r * a.out_stride;
    map_row(a.stream, a.d, out, f, page_ahead(gate), page_ahead(gate + a.d));
  }
  if (a.stream) stream_fence();
}

#else

inline void launch_gated(const char* op, const FloatKernels<GatedKernel>& kernels, const Tensor& x,
                         const Tensor& out) {
  check_same_device(op, x, out);
  check_same_dtype(op, x, out);
  GatedKernel* kernel = kernels.get(float_type(op, x));
  const Rows<2> rows(op, {reads(x), writes(out)});
  const int64_t d = rows.width(1);
  check(rows.width(0) == 2 * d, op, "x must be twice as wide as out");
  const int64_t row_bytes = 3 * d * static_cast<int64_t>(out.element_size());
  const bool stream = streams(rows.size() * row_bytes);
  parallel_rows(rows, row_bytes, [&](const RowSpan<2>& s) {
    kernel({s.data[0], s.stride[0], s.data[1], s.stride[1], d, s.rows, stream});
  });
}

#endif

}  // namespace
}  // namespace opmux::cpu
