// SPDX-License-Identifier: Apache-2.0
// The tensor part of an op: checks, and where a launch goes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "gpu.h"
#include "opmux/check.h"
#include "opmux/dtype.h"
#include "opmux/op.h"
#include "opmux/rows.h"

namespace opmux::gpu {

// Makes the device of a tensor current and holds its current stream; restores the device.
class Place {
 public:
  Place(const char* op, const Tensor& t)
      : guard_(op, t), stream_(vendor::current_stream(op, t.get_device_index())) {}

  Stream stream() const { return stream_; }

 private:
  vendor::DeviceGuard guard_;
  Stream stream_;
};

// A row of this many elements or more is refused: kernels count within a row in 32 bits.
constexpr int64_t kMaxRow = (int64_t{1} << 31) - (1 << 16);

inline void check_row(const char* op, int64_t elements) {
  check(elements < kMaxRow, op, "a row must have fewer than 2**31 elements");
}

}  // namespace opmux::gpu
