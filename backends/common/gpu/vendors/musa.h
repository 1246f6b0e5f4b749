// SPDX-License-Identifier: Apache-2.0
// The names that device code uses, for MUSA.
#pragma once

#include <musa_fp16.h>
#include <musa_runtime.h>

#include <atomic>

#include "types.h"
#include "vendors/portable.h"
#include "vendors/fp8.h"

namespace opmux::gpu {

#if defined(__MUSA_ARCH__) && __MUSA_ARCH__ >= 310
constexpr int kWarp = 32;
#else
constexpr int kWarp = 128;  // mp_21, mp_22
#endif

// ---- lanes: older devices want the width spelt out ----

template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask, kWarp);
}
template <class T>
__device__ inline T shuffle_up(T value, int distance) {
  return __shfl_up_sync(0xffffffffu, value, distance, kWarp);
}
template <class T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane, kWarp);
}
__device__ inline void sync_warp() { __syncwarp(); }

// Over aligned groups of 32 lanes.
__device__ inline uint32_t max_of_32_lanes(uint32_t value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}
__device__ inline uint32_t min_of_32_lanes(uint32_t value) { return ~max_of_32_lanes(~value); }

// ---- memory ----

template <int kBytes>
struct Word;
// clang-format off
template <> struct Word<16> { using Type = uint4; };
template <> struct Word<8> { using Type = uint2; };
template <> struct Word<4> { using Type = unsigned int; };
template <> struct Word<2> { using Type = unsigned short; };
template <> struct Word<1> { using Type = unsigned char; };
// clang-format on

template <class W>
__device__ inline W load_once(const W* from) {
  return *from;
}
template <class W>
__device__ inline void store_once(W* to, W value) {
  *to = value;
}

// Shared memory of a block. Plain here; the test build checks bounds and races behind this type.
template <class T, int kSize>
struct Shared {
  T item[kSize];
  __device__ T& operator[](int i) { return item[i]; }
};

template <int kSize>
__device__ inline uint32_t atomic_add(Shared<uint32_t, kSize>& array, int i, uint32_t value) {
  return atomicAdd(&array.item[i], value);
}
template <int kSize>
__device__ inline void atomic_max(Shared<uint32_t, kSize>& array, int i, uint32_t value) {
  atomicMax(&array.item[i], value);
}

// Copies a word from global memory to element i; nothing here does so while the thread goes on.
template <class W, int kSize>
__device__ inline void copy_async(Shared<W, kSize>& array, int i, const W* from) {
  array[i] = *from;
}
__device__ inline void wait_for_copies() {}

// ---- numbers ----

__device__ inline float to_float(float16 v) { return __half2float(__ushort_as_half(v.bits)); }
template <>
__device__ inline float16 from_float<float16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

// Two at once; the low byte holds the first.
__device__ inline uint32_t fp8_pair_bits(float first, float second) {
  return fp8_bits(first) | fp8_bits(second) << 8;
}
__device__ inline uint32_t fp8_e5m2_pair_bits(float first, float second) {
  return fp8_e5m2_bits(first) | fp8_e5m2_bits(second) << 8;
}
// Four at once; the low byte holds the first.
__device__ inline uint32_t fp8_four_bits(float a, float b, float c, float d) {
  return fp8_pair_bits(a, b) | fp8_pair_bits(c, d) << 16;
}
__device__ inline uint32_t int8_four_bits(float a, float b, float c, float d) {
  return int8_bits(a) | int8_bits(b) << 8 | int8_bits(c) << 16 | int8_bits(d) << 24;
}

__device__ inline uint32_t count_bits(uint32_t v) { return static_cast<uint32_t>(__popc(v)); }
__device__ inline float exp_fast(float v) { return __expf(v); }
__device__ inline float exp2_fast(float v) { return exp2f(v); }
__device__ inline float divide_fast(float a, float b) { return __fdividef(a, b); }

// ---- order of launches, groups of blocks: none ----

__device__ inline void wait_for_previous() {}
__device__ inline void let_next_start() {}
__device__ inline int group_size() { return 1; }
__device__ inline int group_rank() { return 0; }
__device__ inline void group_sync() { __syncthreads(); }
template <class T, int kSize>
__device__ inline T group_read(Shared<T, kSize>& array, int, int i) {
  return array.item[i];
}

// ---- host ----

namespace vendor {

struct Device {
  int processors = 0;
  int threads_per_processor = 0;
};

inline const Device& device() {
  static Device known[64];
  static std::atomic<bool> ready[64];
  int index = 0;
  musaGetDevice(&index);
  index &= 63;
  if (!ready[index].load(std::memory_order_acquire)) {
    Device found;
    musaDeviceGetAttribute(&found.processors, musaDevAttrMultiProcessorCount, index);
    musaDeviceGetAttribute(&found.threads_per_processor, musaDevAttrMaxThreadsPerMultiProcessor,
                           index);
    known[index] = found;
    ready[index].store(true, std::memory_order_release);
  }
  return known[index];
}

// Returns nullptr or an error text.
template <class... Params>
const char* launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, unsigned,
                   Stream stream, void** args) {
  const musaError_t error =
      musaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), args, 0,
                       static_cast<musaStream_t>(stream));
  if (error == musaSuccess) return nullptr;
  musaGetLastError();  // so that torch does not find it later
  return musaGetErrorString(error);
}

inline int max_group() { return 1; }

}  // namespace vendor

}  // namespace opmux::gpu
