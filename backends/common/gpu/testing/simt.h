// SPDX-License-Identifier: Apache-2.0
// The names that device code uses, for a CPU: the device parts of op files compile as host C++ and
// run thread by thread, so that a machine without a GPU executes every shared kernel. Warps have
// OPMUX_SIMT_WARP lanes. What a GPU lets pass by luck is an error here: shared memory read before
// it is written, out of its bounds or without a barrier, barriers and warp operations that not all
// threads reach, and kernels that do not wait for the one before them.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>

#include "types.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

#include "vendors/portable.h"
#include "vendors/fp8.h"

namespace opmux::gpu {

constexpr int kWarp = OPMUX_SIMT_WARP;

struct Index {
  unsigned x;
};
// Of the thread that runs; one runs at a time.
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

// Stops the kernel with an error.
[[noreturn]] void fail(const char* what);
// Waits for all threads of the block.
void barrier();
// Hands `in` to the warp; when all its lanes have, copies that of `lane` to `out`.
void exchange(const void* in, void* out, int bytes, int lane);
void sync_warp();
void waited_for_previous();

// What is known of one element of shared memory: who touched it since the last barrier.
struct Shadow {
  uint64_t block = 0;  // the block that wrote it
  int64_t write_phase = -1, read_phase = -1;
  int writer = -1, reader = -1;       // reader -2: several
  int write_sync = 0, read_sync = 0;  // warp barriers that the warp had passed
  int reader_warp = -1;               // -2: several
  bool atomic = false;
};
void note_read(Shadow& at);
void note_write(Shadow& at, bool atomic);

// Runs a kernel for every thread of every block; returns nullptr or an error text.
const char* run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

}  // namespace simt

inline void __syncthreads() { simt::barrier(); }

// ---- lanes ----

template <class T>
T shuffle(T value, int lane) {
  T out;
  simt::exchange(&value, &out, sizeof(T), lane);
  return out;
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, static_cast<int>(threadIdx.x) % kWarp ^ mask);
}
template <class T>
T shuffle_up(T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return shuffle(value, lane >= distance ? lane - distance : lane);
}
inline void sync_warp() { simt::sync_warp(); }

// Over aligned groups of 32 lanes.
inline uint32_t max_of_32_lanes(uint32_t value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}
inline uint32_t min_of_32_lanes(uint32_t value) { return ~max_of_32_lanes(~value); }

// ---- memory ----

template <int kBytes>
struct Word {
  struct alignas(kBytes) Type {
    char bytes[kBytes];
  };
};

template <class W>
W load_once(const W* from) {
  return *from;
}
template <class W>
void store_once(W* to, W value) {
  *to = value;
}

template <class T, int kSize>
struct Shared {
  T item[kSize];
  simt::Shadow shadow[kSize];

  class Element {
   public:
    Element(T& value, simt::Shadow& shadow) : value_(value), shadow_(shadow) {}
    operator T() const {
      simt::note_read(shadow_);
      return value_;
    }
    T operator=(T value) {
      simt::note_write(shadow_, false);
      return value_ = value;
    }
    T operator=(const Element& other) { return *this = static_cast<T>(other); }
    T operator+=(T value) { return *this = static_cast<T>(*this) + value; }

   private:
    T& value_;
    simt::Shadow& shadow_;
  };

  Element operator[](int i) {
    check(i);
    return {item[i], shadow[i]};
  }
  static void check(int i) {
    if (i < 0 || i >= kSize) simt::fail("shared memory accessed out of its bounds");
  }
};

template <int kSize>
uint32_t atomic_add(Shared<uint32_t, kSize>& array, int i, uint32_t value) {
  array.check(i);
  simt::note_write(array.shadow[i], true);
  return std::exchange(array.item[i], array.item[i] + value);
}
template <int kSize>
void atomic_max(Shared<uint32_t, kSize>& array, int i, uint32_t value) {
  array.check(i);
  simt::note_write(array.shadow[i], true);
  if (array.item[i] < value) array.item[i] = value;
}

// Copies a word from global memory to element i; nothing here does so while the thread goes on.
template <class W, int kSize>
inline void copy_async(Shared<W, kSize>& array, int i, const W* from) {
  array[i] = *from;
}
inline void wait_for_copies() {}

// ---- numbers ----

inline float to_float(float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t exponent = v.bits >> 10 & 31, fraction = v.bits & 0x3ff;
  if (exponent == 0) {
    const float small = static_cast<float>(fraction) * 0x1p-24f;
    return bits_as_float(float_as_bits(small) | sign);
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return bits_as_float(sign | wide << 23 | fraction << 13);
}

template <>
inline float16 from_float<float16>(float v) {
  const uint32_t bits = float_as_bits(v), size = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (size > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (size >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 0x38800000) {  // subnormal: the addition rounds at the last bit that there is
    const uint32_t rounded = float_as_bits(bits_as_float(size) + 0.5f) - float_as_bits(0.5f);
    return {static_cast<uint16_t>(sign | rounded)};
  }
  return {static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13)};
}

// Two at once; the low byte holds the first.
inline uint32_t fp8_pair_bits(float first, float second) {
  return fp8_bits(first) | fp8_bits(second) << 8;
}
inline uint32_t fp8_e5m2_pair_bits(float first, float second) {
  return fp8_e5m2_bits(first) | fp8_e5m2_bits(second) << 8;
}
// Four at once; the low byte holds the first.
inline uint32_t fp8_four_bits(float a, float b, float c, float d) {
  return fp8_pair_bits(a, b) | fp8_pair_bits(c, d) << 16;
}
inline uint32_t int8_four_bits(float a, float b, float c, float d) {
  return int8_bits(a) | int8_bits(b) << 8 | int8_bits(c) << 16 | int8_bits(d) << 24;
}

inline uint32_t count_bits(uint32_t v) { return static_cast<uint32_t>(__builtin_popcount(v)); }
inline float exp_fast(float v) { return expf(v); }
inline float exp2_fast(float v) { return exp2f(v); }
inline float divide_fast(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }

// ---- order of launches, groups of blocks ----

inline void wait_for_previous() { simt::waited_for_previous(); }
inline void let_next_start() {}
inline int group_size() { return 1; }
inline int group_rank() { return 0; }
inline void group_sync() { __syncthreads(); }
template <class T, int kSize>
T group_read(Shared<T, kSize>& array, int, int i) {
  return array[i];
}

// ---- host ----

namespace vendor {

// A small device, so that small samples take the paths for much work too.
struct Device {
  int processors = 2;
  int threads_per_processor = 512;
};
inline const Device& device() {
  static const Device only;
  return only;
}
inline int max_group() { return 1; }

template <class... Params, size_t... kIndex>
const char* run(void (*kernel)(Params...), unsigned blocks, unsigned threads, void** args,
                std::index_sequence<kIndex...>) {
  return simt::run(blocks, threads, [&] { kernel(*static_cast<Params*>(args[kIndex])...); });
}
template <class... Params>
const char* launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, unsigned, Stream,
                   void** args) {
  return run(kernel, blocks, threads, args, std::index_sequence_for<Params...>{});
}

}  // namespace vendor

}  // namespace opmux::gpu
