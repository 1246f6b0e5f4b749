// SPDX-License-Identifier: Apache-2.0
// An op file is compiled twice over. As *kernel*, once per ISA, it sees vec.h, pointers and sizes,
// but neither torch nor the standard library. As *launcher*, once, it sees tensors and calls the
// kernels of the ISA that opmux_register chose, through a table. The macros below join the two:
//
//   using Scale = void(const void* x, void* out, int64_t n);       // both sides see the signature
//   #if OPMUX_KERNEL
//   template <class T> void scale_kernel(const void* x, void* out, int64_t n) { ... }
//   #endif
//   OPMUX_FLOAT_KERNELS(scale_kernels, Scale, scale_kernel);
//   #if OPMUX_LAUNCHER
//   void scale(const Tensor& x, Tensor out) {
//     Scale* kernel = scale_kernels.get(float_type("scale", x));
//     ...
//   }
//   OPMUX_OP(scale, scale);
//   #endif
//
// Everything in an op file stands in an anonymous namespace, as vec.h does: two ISAs' copies of
// one function must never meet in the linker.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "isa.h"

#ifdef OPMUX_KERNEL_ISA
#define OPMUX_KERNEL 1
#define OPMUX_LAUNCHER 0
#else
#define OPMUX_KERNEL 0
#define OPMUX_LAUNCHER 1
#endif

namespace opmux::cpu {

constexpr int kKernelTypes = 3;  // float32, bfloat16, float16, in the order of FloatType

using AnyFunction = void (*)();

struct KernelEntry {
  const char* table;
  Isa isa;
  AnyFunction functions[kKernelTypes];
};

struct KernelTable {
  const char* name;
  AnyFunction functions[kKernelTypes];  // null until the library is registered
};

}  // namespace opmux::cpu

#if OPMUX_KERNEL

#include "vec.h"

// The sections hold pointers, not entries: the compiler may pad a structure, never a pointer.
#define OPMUX_KERNEL_ENTRY(table, ...)                                                  \
  static const ::opmux::cpu::KernelEntry table##_entry = {                              \
      #table, ::opmux::cpu::Isa::OPMUX_KERNEL_ISA, {__VA_ARGS__}};                      \
  __attribute__((section("opmux_kernels"),                                              \
                 used)) static const ::opmux::cpu::KernelEntry* const table##_pointer = \
      &table##_entry
#define OPMUX_ANY_FUNCTION(Signature, ...) \
  reinterpret_cast<::opmux::cpu::AnyFunction>(static_cast<Signature*>(&__VA_ARGS__))

// One kernel that is no template, or a template instantiated by the caller.
#define OPMUX_ONE_KERNEL(table, Signature, function) \
  OPMUX_KERNEL_ENTRY(table, OPMUX_ANY_FUNCTION(Signature, function))
// A kernel template over the element type, for each floating type.
#define OPMUX_FLOAT_KERNELS(table, Signature, function)                     \
  OPMUX_KERNEL_ENTRY(table, OPMUX_ANY_FUNCTION(Signature, function<float>), \
                     OPMUX_ANY_FUNCTION(Signature, function<bfloat16>),     \
                     OPMUX_ANY_FUNCTION(Signature, function<float16>))

#else

#include "opmux/check.h"
#include "opmux/dtype.h"
#include "opmux/op.h"
#include "opmux/rows.h"
#include "parallel.h"

namespace opmux::cpu {

template <class Signature>
struct OneKernel : KernelTable {
  Signature* get() const { return reinterpret_cast<Signature*>(functions[0]); }
};

template <class Signature>
struct FloatKernels : KernelTable {
  Signature* get(FloatType type) const {
    return reinterpret_cast<Signature*>(functions[static_cast<int>(type)]);
  }
};
static_assert(kKernelTypes == kFloatTypes);

}  // namespace opmux::cpu

#define OPMUX_KERNEL_TABLE(Type, table)             \
  static ::opmux::cpu::Type table = {{#table, {}}}; \
  __attribute__((section("opmux_tables"),           \
                 used)) static ::opmux::cpu::KernelTable* const table##_pointer = &table

#define OPMUX_ONE_KERNEL(table, Signature, function) OPMUX_KERNEL_TABLE(OneKernel<Signature>, table)
#define OPMUX_FLOAT_KERNELS(table, Signature, function) \
  OPMUX_KERNEL_TABLE(FloatKernels<Signature>, table)

#endif
