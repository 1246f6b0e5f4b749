// SPDX-License-Identifier: Apache-2.0
// The current stream of torch_musa's device, which torch knows as PrivateUse1.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "opmux/check.h"

namespace opmux::gpu::vendor {

// torch_musa's library exports it and is no dependency of libtorch: it is found when it is loaded.
inline void* current_stream(const char* op, int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get =
      reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_musa_stream"));
  check(get != nullptr, op, "torch_musa is not imported, or too old to name its stream");
  void* stream = nullptr;
  check(get(device, &stream) == 0, op, "no current stream");
  return stream;
}

inline bool serves(const Tensor& t) { return device_of(t) == aoti_torch_device_type_privateuse1(); }

}  // namespace opmux::gpu::vendor

#include "vendors/torch_guard.h"
