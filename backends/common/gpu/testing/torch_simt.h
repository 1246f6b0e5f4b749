// SPDX-License-Identifier: Apache-2.0
// The launchers' side of the test build: tensors lie on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "opmux/check.h"

namespace opmux::gpu::vendor {

inline void* current_stream(const char*, int32_t) { return nullptr; }

struct DeviceGuard {
  DeviceGuard(const char* op, const Tensor& t) {
    check(device_of(t) == aoti_torch_device_type_cpu(), op, "tensor is not on the CPU");
  }
};

}  // namespace opmux::gpu::vendor
