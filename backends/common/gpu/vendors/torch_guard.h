// SPDX-License-Identifier: Apache-2.0
// The current device, for every vendor whose devices torch knows as its accelerator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "opmux/check.h"

namespace opmux::gpu::vendor {

class DeviceGuard {
 public:
  DeviceGuard(const char* op, const Tensor& t) {
    check(serves(t), op, "tensor is on another kind of device");
    const int32_t device = t.get_device_index();
    int32_t current = -1;
    check(aoti_torch_get_current_device_index(&current) == 0, op, "no current device");
    if (current == device) return;
    check(aoti_torch_create_device_guard(device, &guard_) == 0, op, "device cannot be current");
  }
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

}  // namespace opmux::gpu::vendor
