// SPDX-License-Identifier: Apache-2.0
// gelu_quick(x) -> out: x * sigmoid(1.702 * x)
#include "activation/elementwise.h"
#include "math.cuh"

namespace opmux::gpu {

// x and out, of d elements a row
void launch_gelu_quick(const Plane<2>& rows, int64_t d, FloatType type, Stream stream);

#if OPMUX_KERNEL
struct GeluQuick {
  template <class T, int kSize>
  static __device__ void read(const T* x, int64_t, Vec<T, kSize> (&in)[1]) {
    in[0] = load<kSize>(x);
  }
  static __device__ float compute(float v) { return v * sigmoid(1.702f * v); }
};
void launch_gelu_quick(const Plane<2>& rows, int64_t d, FloatType type, Stream stream) {
  launch_elementwise<GeluQuick, 1>("gelu_quick", rows, d, type, stream);
}
#endif

#if OPMUX_LAUNCHER
void gelu_quick(const Tensor& x, Tensor out) {
  constexpr const char* kOp = "gelu_quick";
  check_same_device(kOp, x, out);
  check_same_dtype(kOp, x, out);
  check_same_shape(kOp, x, out);
  const FloatType type = float_type(kOp, x);
  const Rows<2> rows(kOp, {reads(x), writes(out)});
  const int64_t d = rows.width(0);
  check_row(kOp, d);
  if (rows.size() * d == 0) return;
  const Place place(kOp, x);
  rows.for_planes(
      [&](const Plane<2>& plane) { launch_gelu_quick(plane, d, type, place.stream()); });
}
OPMUX_OP(gelu_quick, gelu_quick);
#endif

}  // namespace opmux::gpu
