// SPDX-License-Identifier: Apache-2.0
// What this CPU can run. Compiled for plain x86-64, like everything outside the kernels.
#include "host.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace opmux::cpu {
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // all zero if unknown
  return r;
}

bool has(unsigned word, std::initializer_list<int> bits) {
  for (int bit : bits) {
    if (!(word >> bit & 1)) return false;
  }
  return true;
}

// Which register files the operating system saves. The instruction needs OSXSAVE.
uint64_t xcr0() {
  unsigned low = 0, high = 0;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));  // xgetbv
  return static_cast<uint64_t>(high) << 32 | low;
}

int count_isas() {
  const Registers base = cpuid(1), features = cpuid(7), more = cpuid(7, 1);
  const Registers extended = cpuid(0x80000001);
  // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT
  if (!has(base.ecx, {0, 9, 13, 19, 20, 23})) return 0;
  if (!has(base.ecx, {27})) return 1;
  const uint64_t saved = xcr0();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6;
  // FMA, MOVBE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT
  if ((saved & kYmm) != kYmm || !has(base.ecx, {12, 22, 28, 29}) || !has(features.ebx, {3, 5, 8}) ||
      !has(extended.ecx, {5})) {
    return 1;
  }
  // F, DQ, CD, BW, VL
  if ((saved & kZmm) != kZmm || !has(features.ebx, {16, 17, 28, 30, 31})) return 2;
  if (!has(more.eax, {5})) return 3;
  return has(features.edx, {23}) ? 5 : 4;
}

// Linux hands out the tile registers on request only, once per process.
std::string ask_for_amx(bool* usable) {
  *usable = false;
  const Registers features = cpuid(7);
  if (!has(features.edx, {24})) return "";
  std::string kinds = "AMX tiles";
  if (has(features.edx, {22})) kinds += ", bf16";
  if (has(features.edx, {25})) kinds += ", int8";
  constexpr uint64_t kTiles = 0x60000;
  if (!has(cpuid(1).ecx, {27}) || (xcr0() & kTiles) != kTiles) {
    return kinds + " present, but the operating system does not save the tile registers";
  }
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return kinds + " present, but the kernel refused them: " + std::strerror(errno);
  }
  *usable = true;
  return kinds + " usable";
}

std::string brand() {
  if (cpuid(0x80000000).eax < 0x80000004) return "x86-64";
  char text[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002 + i);
    std::memcpy(text + 16 * i, &r, sizeof r);
  }
  std::string name(text);
  name.erase(name.find_last_not_of(' ') + 1);
  return name;
}

// Intel describes its caches in leaf 4, AMD in 0x8000001d, alike.
void find_last_level_cache(Host* host) {
  host->cache_bytes = int64_t{32} << 20;  // of most servers, should neither leaf tell
  host->cache_threads = 16;
  unsigned highest = 0;
  for (unsigned leaf : {4u, 0x8000001du}) {
    for (unsigned i = 0; i < 8; ++i) {
      const Registers r = cpuid(leaf, i);
      const unsigned type = r.eax & 0x1f, level = r.eax >> 5 & 7;
      if (type == 0) break;
      if (level < highest) continue;
      highest = level;
      const int64_t ways = (r.ebx >> 22) + 1, partitions = (r.ebx >> 12 & 0x3ff) + 1;
      const int64_t line = (r.ebx & 0xfff) + 1, sets = int64_t{r.ecx} + 1;
      host->cache_bytes = ways * partitions * line * sets;
      host->cache_threads = static_cast<int>(r.eax >> 14 & 0xfff) + 1;
    }
  }
}

std::string list(int count) {
  std::string names;
  for (int i = 0; i < count; ++i) names += (i ? ", " : "") + std::string(kIsaNames[i]);
  return names;
}

}  // namespace

const Host& host() {
  static const Host known = [] {
    Host h;
    h.isas = count_isas();
    h.amx_state = ask_for_amx(&h.amx);
    h.cpu = brand();
    find_last_level_cache(&h);
    return h;
  }();
  return known;
}

Isa chosen_isa() {
  const int isas = host().isas;
  if (isas == 0) {
    throw std::runtime_error("this CPU (" + host().cpu + ") lacks x86-64-v2 (SSE 4.2, POPCNT)");
  }
  const char* wanted = std::getenv("OPMUX_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return static_cast<Isa>(isas - 1);
  const std::string name = std::string("OPMUX_CPU_ISA=") + wanted;
  for (int i = 0; i < kIsas; ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    if (i < isas) return static_cast<Isa>(i);
    throw std::runtime_error(name + ": this CPU has no such instructions, only " + list(isas));
  }
  throw std::runtime_error(name + ": not one of " + list(kIsas));
}

}  // namespace opmux::cpu
