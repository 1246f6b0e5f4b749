// SPDX-License-Identifier: Apache-2.0
// What the gated activations share: out = f(x[..., :d], x[..., d:]).
#pragma once

#include "activation/elementwise.h"

namespace opmux::gpu {

struct GatedRows {
  Plane<2> rows;  // x, of 2 * d elements a row, and out, of d
  int64_t d;
  FloatType type;
};
using LaunchGated = void(const GatedRows& rows, Stream stream);

#if OPMUX_KERNEL

template <class F>
struct Gated {
  template <class T, int kSize>
  static __device__ void read(const T* x, int64_t d, Vec<T, kSize> (&in)[2]) {
    in[0] = load<kSize>(x);
    in[1] = load<kSize>(x + d);
  }
  static __device__ float compute(float gate, float up) { return F{}(gate, up); }
};

template <class F>
void launch_gated(const char* op, const GatedRows& a, Stream stream) {
  launch_elementwise<Gated<F>, 2>(op, a.rows, a.d, a.type, stream);
}

#else

inline void gated(const char* op, LaunchGated* launch, const Tensor& x, const Tensor& out) {
  check_same_device(op, x, out);
  check_same_dtype(op, x, out);
  const FloatType type = float_type(op, x);
  const Rows<2> rows(op, {reads(x), writes(out)});
  const int64_t d = rows.width(1);
  check(rows.width(0) == 2 * d, op, "x must be twice as wide as out");
  check_row(op, 2 * d);
  if (rows.size() * d == 0) return;
  const Place place(op, x);
  rows.for_planes([&](const Plane<2>& plane) { launch({plane, d, type}, place.stream()); });
}

#endif

}  // namespace opmux::gpu
