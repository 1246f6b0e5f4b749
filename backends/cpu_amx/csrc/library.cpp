// SPDX-License-Identifier: Apache-2.0
// What the library exports: opmux_register, opmux_interface, opmux_info.
#include <cstring>
#include <exception>
#include <string>

#include "host.h"
#include "kernel.h"
#include "opmux/register.h"

// Made by the linker: the bounds of what OPMUX_..._KERNEL put into its sections.
#define OPMUX_BOUND extern "C" __attribute__((visibility("hidden")))
OPMUX_BOUND const opmux::cpu::KernelEntry* const __start_opmux_kernels[];
OPMUX_BOUND const opmux::cpu::KernelEntry* const __stop_opmux_kernels[];
OPMUX_BOUND opmux::cpu::KernelTable* const __start_opmux_tables[];
OPMUX_BOUND opmux::cpu::KernelTable* const __stop_opmux_tables[];

namespace opmux::cpu {
namespace {

// Points every table at its kernels for `isa`, or for the next ISA below that it was compiled for.
void fill_tables(Isa isa) {
  for (auto* table = __start_opmux_tables; table != __stop_opmux_tables; ++table) {
    const KernelEntry* best = nullptr;
    for (auto* entry = __start_opmux_kernels; entry != __stop_opmux_kernels; ++entry) {
      const bool fits = std::strcmp((*entry)->table, (*table)->name) == 0 && (*entry)->isa <= isa;
      if (fits && (best == nullptr || (*entry)->isa > best->isa)) best = *entry;
    }
    check(best != nullptr, (*table)->name, "the library has no such kernels");
    std::memcpy((*table)->functions, best->functions, sizeof best->functions);
  }
}

int active_isa = -1;  // of enum Isa, once registered

std::string quoted(const std::string& text) {
  std::string json = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') json += '\\';
    if (static_cast<unsigned char>(c) >= ' ') json += c;
  }
  return json + '"';
}

}  // namespace
}  // namespace opmux::cpu

OPMUX_EXPORT const char* opmux_register(const char* ns) {
  using namespace opmux::cpu;
  static std::string error;
  try {
    const int isa = static_cast<int>(chosen_isa());
    if (active_isa < 0) {
      fill_tables(static_cast<Isa>(isa));
      active_isa = isa;
    } else if (active_isa != isa) {
      error = std::string("OPMUX_CPU_ISA=") + kIsaNames[isa] + ": this process already uses " +
              kIsaNames[active_isa];
      return error.c_str();
    }
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return opmux::register_ops(ns, "CPU");
}

OPMUX_EXPORT const char* opmux_interface() { return opmux::interface_text(); }

OPMUX_EXPORT const char* opmux_info() {
  using namespace opmux::cpu;
  static std::string info;
  int isa = active_isa;
  if (isa < 0) {
    try {
      isa = static_cast<int>(chosen_isa());
    } catch (const std::exception&) {  // opmux_register reports it
    }
  }
  std::string isas;
  for (int i = 0; i < host().isas; ++i) isas += (i ? ", " : "") + quoted(kIsaNames[i]);
  info = "{\"isa\": " + quoted(isa < 0 ? "" : kIsaNames[isa]) + ", \"isas\": [" + isas +
         "], \"amx\": " + quoted(host().amx_state) + ", \"cpu\": " + quoted(host().cpu) + "}";
  return info.c_str();
}
