// SPDX-License-Identifier: Apache-2.0
// gelu_quick(x) -> out: x * sigmoid(1.702 * x)
#include "elementwise.h"

namespace opmux::cpu {
namespace {

struct UnaryRows {
  const void* x;
  int64_t x_stride;
  void* out;
  int64_t out_stride;
  int64_t width;
  int64_t rows;
  bool stream;
};
using UnaryKernel = void(const UnaryRows&);

#if OPMUX_KERNEL
template <class T>
void gelu_quick_rows(const UnaryRows& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    T* out = static_cast<T*>(a.out) + r * a.out_stride;
    const auto f = [](Vec v) { return times_sigmoid<T>(v, 1.702f * v); };
    map_row(a.stream, a.width, out, f, page_ahead(x));
  }
  if (a.stream) stream_fence();
}
#endif

OPMUX_FLOAT_KERNELS(gelu_quick_kernels, UnaryKernel, gelu_quick_rows);

#if OPMUX_LAUNCHER
void gelu_quick(const Tensor& x, Tensor out) {
  constexpr const char* kOp = "gelu_quick";
  check_same_device(kOp, x, out);
  check_same_dtype(kOp, x, out);
  check_same_shape(kOp, x, out);
  UnaryKernel* kernel = gelu_quick_kernels.get(float_type(kOp, x));
  const Rows<2> rows(kOp, {reads(x), writes(out)});
  const int64_t width = rows.width(0);
  const int64_t row_bytes = 2 * width * static_cast<int64_t>(x.element_size());
  const bool stream = streams(rows.size() * row_bytes);
  parallel_rows(rows, row_bytes, [&](const RowSpan<2>& s) {
    kernel({s.data[0], s.stride[0], s.data[1], s.stride[1], width, s.rows, stream});
  });
}
OPMUX_OP(gelu_quick, gelu_quick);
#endif

}  // namespace
}  // namespace opmux::cpu
