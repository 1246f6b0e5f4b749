// SPDX-License-Identifier: Apache-2.0
// The instruction sets that every op is compiled for, each containing the one before it.
#pragma once

namespace opmux::cpu {

enum class Isa : int {
  x86_64_v2,    // SSE 4.2: the least that is served
  avx2,         // x86-64-v3: AVX2, FMA, F16C
  avx512,       // x86-64-v4: F, BW, CD, DQ, VL
  avx512_bf16,  // Cooper Lake, Zen 4
  avx512_fp16,  // Sapphire Rapids; a machine with AMX has it too
};
constexpr int kIsas = 5;

}  // namespace opmux::cpu
