// SPDX-License-Identifier: Apache-2.0
// What an op file includes first, and the only file that knows that there are several vendors.
//
// An op is one .cu file, compiled twice. As *kernel*, by the device compiler, it sees pointers,
// sizes and a stream, never a torch header. As *launcher*, by the host compiler, it sees tensors,
// never a device header. The two meet in a plain function that both declare:
//
//   void scale_rows(FloatType type, const Plane<2>& rows, int64_t width, Stream stream);
//   #if OPMUX_KERNEL
//   ... kernels, and the definition of scale_rows, which launches them
//   #endif
//   #if OPMUX_LAUNCHER
//   void scale(const Tensor& x, Tensor out) { ... scale_rows(...); }
//   OPMUX_OP(scale, scale);
//   #endif
//
// Blocks have multiples of kBlockUnit threads and code never assumes that a warp has 32 lanes: it
// has 64 on CDNA and 128 on older MUSA devices, and host code cannot know which.
#pragma once

#include <cstddef>
#include <cstdint>

#include "opmux/float_type.h"
#include "opmux/plane.h"

#ifdef OPMUX_GPU_KERNEL
#define OPMUX_KERNEL 1
#define OPMUX_LAUNCHER 0
#else
#define OPMUX_KERNEL 0
#define OPMUX_LAUNCHER 1
#endif

namespace opmux::gpu {

using Stream = void*;  // the vendor's stream handle

constexpr int kBlockUnit = 128;  // the widest warp of all vendors
constexpr int kMaxThreads = 1024;

}  // namespace opmux::gpu

#if OPMUX_KERNEL
#if defined(OPMUX_VENDOR_CUDA)
#include "vendors/cuda.h"
#elif defined(OPMUX_VENDOR_HIP)
#include "vendors/hip.h"
#elif defined(OPMUX_VENDOR_MUSA)
#include "vendors/musa.h"
#elif defined(OPMUX_VENDOR_SIMT)
#include "testing/simt.h"
#else
#error "define OPMUX_VENDOR_CUDA, _HIP, _MUSA or _SIMT"
#endif
#include "launch.h"
#else
#if defined(OPMUX_VENDOR_CUDA) || defined(OPMUX_VENDOR_HIP)
#include "vendors/torch_cuda.h"
#elif defined(OPMUX_VENDOR_MUSA)
#include "vendors/torch_musa.h"
#elif defined(OPMUX_VENDOR_SIMT)
#include "testing/torch_simt.h"
#else
#error "define OPMUX_VENDOR_CUDA, _HIP, _MUSA or _SIMT"
#endif
#include "host.h"
#endif
