// SPDX-License-Identifier: Apache-2.0
// Quantisation with a scale for each group of a row, of x itself or of the gate of its halves.
#pragma once

#include "quantization/quantize.h"

namespace opmux::gpu {

struct GroupQuantRows {
  const void* x;
  int64_t x_stride;
  QuantizedRows out;
  FloatType type;
};
using LaunchGroupQuant = void(const GroupQuantRows&, Stream);

#if OPMUX_LAUNCHER

// A row of x is `inputs` times as wide as one of out_q.
inline void group_quant(const char* op, LaunchGroupQuant* launch, int64_t inputs, const Tensor& x,
                        int64_t group_size, bool int8, int64_t scale_layout, const Tensor& out_q,
                        const Tensor& out_scale) {
  check_same_device(op, x, out_q, out_scale);
  const FloatType type = float_type(op, x);
  check(x.dim() == 2 && x.size(1) % inputs == 0, op, "x has another shape");
  check_row(op, x.size(1));
  const int64_t tokens = x.size(0), width = x.size(1) / inputs;
  const QuantizedRows out =
      group_rows(op, out_q, out_scale, tokens, width, group_size, int8, scale_layout);
  if (tokens * width == 0) return;
  const Place place(op, x);
  launch({x.const_data_ptr(), row_stride(x), out, type}, place.stream());
}

#endif

}  // namespace opmux::gpu
