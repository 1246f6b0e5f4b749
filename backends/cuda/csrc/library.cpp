// SPDX-License-Identifier: Apache-2.0
// What the library exports: opmux_register, opmux_interface, opmux_info.
#include "opmux/register.h"

OPMUX_EXPORT const char* opmux_register(const char* ns) { return opmux::register_ops(ns, "CUDA"); }

OPMUX_EXPORT const char* opmux_interface() { return opmux::interface_text(); }

// The build's facts; the device is asked by the backend's probe, through torch.
OPMUX_EXPORT const char* opmux_info() {
  return "{\"archs\": \"" OPMUX_CUDA_ARCHS "\", \"toolkit\": \"" OPMUX_CUDA_TOOLKIT "\"}";
}
