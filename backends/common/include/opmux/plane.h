// SPDX-License-Identifier: Apache-2.0
// Rows of N operands on two nested loops, which covers nearly every view that engines pass: a dense
// tensor, rows of a wider buffer, heads of a fused projection. Free of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace opmux {

// Row r of operand k begins at data[k] + (r / inner_rows) * outer_stride[k] +
// (r % inner_rows) * inner_stride[k]. Strides count elements.
template <size_t N>
struct Plane {
  void* data[N];
  int64_t inner_stride[N];
  int64_t outer_stride[N];
  int64_t inner_rows;
  int64_t rows;
};

}  // namespace opmux
