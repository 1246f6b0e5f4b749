// SPDX-License-Identifier: Apache-2.0
// The current stream of torch's CUDA device, which is also what torch calls a ROCm device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "opmux/check.h"

// Weak: the library loads beside a torch without CUDA, where it can be asked what it implements.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace opmux::gpu::vendor {

inline void* current_stream(const char* op, int32_t device) {
  check(&aoti_torch_get_current_cuda_stream != nullptr, op, "this torch was built without CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == 0, op, "no current stream");
  return stream;
}

inline bool serves(const Tensor& t) { return device_of(t) == aoti_torch_device_type_cuda(); }

}  // namespace opmux::gpu::vendor

#include "vendors/torch_guard.h"
