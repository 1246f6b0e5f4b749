// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "isa.h"

namespace opmux::cpu {

constexpr std::array<const char*, kIsas> kIsaNames = {"x86_64_v2", "avx2", "avx512", "avx512_bf16",
                                                      "avx512_fp16"};

struct Host {
  int isas;               // the first `isas` of enum Isa run here; 0: this CPU is not served
  bool amx;               // tile instructions run in this process
  std::string amx_state;  // a sentence, empty where the CPU has no AMX
  std::string cpu;
  int64_t cache_bytes;  // of one last-level cache
  int cache_threads;    // hardware threads that share it
};

// Asks the CPU and the operating system once.
const Host& host();

// The best ISA, or the one that OPMUX_CPU_ISA names. Throws std::runtime_error.
Isa chosen_isa();

}  // namespace opmux::cpu
