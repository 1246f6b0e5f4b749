// SPDX-License-Identifier: Apache-2.0
#include "opmux/register.h"

OPMUX_EXPORT const char* opmux_register(const char* ns) { return opmux::register_ops(ns, "CPU"); }
OPMUX_EXPORT const char* opmux_interface() { return opmux::interface_text(); }
OPMUX_EXPORT const char* opmux_info() { return "{}"; }
