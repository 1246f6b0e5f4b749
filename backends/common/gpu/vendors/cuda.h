// SPDX-License-Identifier: Apache-2.0
// The names that device code uses, for CUDA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <atomic>

#include "types.h"

namespace opmux::gpu {

constexpr int kWarp = 32;
// Threads that a multiprocessor holds: more than that as a launch bound is an error.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || \
                               __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kResidentThreads = 1536;
#else
constexpr int kResidentThreads = 2048;
#endif

// ---- lanes ----

template <class T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
__device__ inline T shuffle_up(T value, int distance) {
  return __shfl_up_sync(0xffffffffu, value, distance);
}
template <class T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
__device__ inline void sync_warp() { __syncwarp(); }

// Over aligned groups of 32 lanes: one instruction, where a tree of shuffles takes ten times as
// long.
__device__ inline uint32_t max_of_32_lanes(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}
__device__ inline uint32_t min_of_32_lanes(uint32_t value) {
  return __reduce_min_sync(0xffffffffu, value);
}

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

// In global memory, by one instruction: many a plain assignment becomes four of 4 bytes.
template <class W>
__device__ inline void store_word(W* to, W value) {
  __stwb(to, value);
}
// For data that nothing on the device reads again: it leaves the caches first.
template <class W>
__device__ inline W load_once(const W* from) {
  return __ldcs(from);
}
template <class W>
__device__ inline void store_once(W* to, W value) {
  __stcs(to, value);
}

// Fetches what lies there into the cache that the whole device shares, so it may come before
// wait_for_previous(): what the kernel before still writes is seen.
__device__ inline void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
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

// Copies a word from global memory to element i while the thread goes on, until it waits for all
// the copies that it has begun.
template <class W, int kSize>
__device__ inline void copy_async(Shared<W, kSize>& array, int i, const W* from) {
  __pipeline_memcpy_async(&array.item[i], from, sizeof(W));
}
__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

// ---- numbers ----

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bfloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
__device__ inline float to_float(float16 v) { return __half2float(__ushort_as_half(v.bits)); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline bfloat16 from_float<bfloat16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ inline float16 from_float<float16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

// Two at once is one instruction. The low half holds the first.
template <class T>
__device__ uint32_t pair_bits(float first, float second);
template <>
__device__ inline uint32_t pair_bits<bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pair_bits<float16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline float exp_fast(float v) { return __expf(v); }
// One instruction: __expf spends three more on results below 2^-126, which are 0 here.
__device__ inline float exp2_fast(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ inline float divide_fast(float a, float b) { return __fdividef(a, b); }
__device__ inline uint32_t count_bits(uint32_t v) { return static_cast<uint32_t>(__popc(v)); }
__device__ inline float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t float_as_bits(float v) { return __float_as_uint(v); }

}  // namespace opmux::gpu

#include "vendors/fp8.h"

namespace opmux::gpu {

// Two at once; the low byte holds the first.
__device__ inline uint32_t fp8_pair_bits(float first, float second) {
#if __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
#else
  return fp8_bits(first) | fp8_bits(second) << 8;
#endif
}
__device__ inline uint32_t fp8_e5m2_pair_bits(float first, float second) {
#if __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E5M2);
#else
  return fp8_e5m2_bits(first) | fp8_e5m2_bits(second) << 8;
#endif
}

// Four at once; the low byte holds the first.
__device__ inline uint32_t fp8_four_bits(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  uint32_t bits;
  asm("{\n"
      "  .reg .b16 low, high;\n"
      "  cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "  cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "  mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(bits)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return bits;
#else
  return fp8_pair_bits(a, b) | fp8_pair_bits(c, d) << 16;
#endif
}
// Conversions to integers saturate, and make 0 of NaN.
__device__ inline uint32_t int8_four_bits(float a, float b, float c, float d) {
  const auto integer = [](float v) { return max(__float2int_rn(v), -127); };
  uint32_t bits;
  asm("{\n"
      "  .reg .b32 high;\n"
      "  cvt.pack.sat.s8.s32.b32 high, %4, %3, 0;\n"
      "  cvt.pack.sat.s8.s32.b32 %0, %2, %1, high;\n"
      "}"
      : "=r"(bits)
      : "r"(integer(a)), "r"(integer(b)), "r"(integer(c)), "r"(integer(d)));
  return bits;
}

// ---- order of launches ----

// A kernel may start while the one before it drains; nothing in memory may be touched before this.
// Every block calls it first: a block that left without it would end the kernel too early for the
// next one.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
// Lets the next kernel of the stream take the places that this one leaves free.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// ---- groups of blocks that read one another's shared memory: clusters, from Hopper on ----

__device__ inline int group_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}
__device__ inline int group_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}
// A barrier for all threads of the group; orders their accesses to shared memory.
__device__ inline void group_sync() {
#if __CUDA_ARCH__ >= 900
  if (__clusterSizeInBlocks() > 1) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    return;
  }
#endif
  __syncthreads();
}
// Element i of another block's array.
template <class T, int kSize>
__device__ inline T group_read(Shared<T, kSize>& array, int rank, int i) {
#if __CUDA_ARCH__ >= 900
  return *static_cast<const T*>(
      __cluster_map_shared_rank(&array.item[i], static_cast<unsigned>(rank)));
#else
  (void)rank;
  return array.item[i];
#endif
}

// ---- host ----

namespace vendor {

struct Device {
  int processors = 0;
  int threads_per_processor = 0;
  bool overlaps = false;  // programmatic dependent launch, and clusters
};

inline const Device& device() {
  static Device known[64];
  static std::atomic<bool> ready[64];
  int index = 0;
  cudaGetDevice(&index);
  index &= 63;
  if (!ready[index].load(std::memory_order_acquire)) {
    Device found;
    int major = 0;
    cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&found.threads_per_processor, cudaDevAttrMaxThreadsPerMultiProcessor,
                           index);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    found.overlaps = major >= 9;
    known[index] = found;
    ready[index].store(true, std::memory_order_release);
  }
  return known[index];
}

// Returns nullptr or an error text.
template <class... Params>
const char* launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, unsigned group,
                   Stream stream, void** args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (device().overlaps) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
    if (group > 1) {
      attributes[1].id = cudaLaunchAttributeClusterDimension;
      attributes[1].val.clusterDim.x = group;
      attributes[1].val.clusterDim.y = 1;
      attributes[1].val.clusterDim.z = 1;
      config.numAttrs = 2;
    }
  }
  const cudaError_t error =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), args);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // so that torch does not find it later
  return cudaGetErrorString(error);
}

// How many blocks of a group may work on one row.
inline int max_group() { return device().overlaps ? 8 : 1; }

}  // namespace vendor

}  // namespace opmux::gpu
