// SPDX-License-Identifier: Apache-2.0
// OPMUX_OP(name, function): offers `function` as the implementation of op `name`. Nothing runs at
// dlopen: the entry lies in a linker section that register.h reads when the loader asks for it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

#include "opmux/check.h"

namespace opmux {

struct OpEntry {
  const char* name;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
  const char* const* types;  // as core spells them, ended by nullptr
};

// TORCH_BOX converts whatever it is given: a float or int parameter compiles and receives garbage.
// Only the types below exist in a schema, so only they have a spelling; the rest does not compile.
// A tensor that the op writes is taken by value, one that it reads by const reference.
template <class T>
struct SchemaType;
// clang-format off
template <> struct SchemaType<Tensor> { static constexpr const char* kName = "Tensor!"; };
template <> struct SchemaType<const Tensor&> { static constexpr const char* kName = "Tensor"; };
template <> struct SchemaType<std::optional<Tensor>> {
  static constexpr const char* kName = "Tensor!?";
};
template <> struct SchemaType<const std::optional<Tensor>&> {
  static constexpr const char* kName = "Tensor?";
};
template <> struct SchemaType<int64_t> { static constexpr const char* kName = "int"; };
template <> struct SchemaType<double> { static constexpr const char* kName = "float"; };
template <> struct SchemaType<bool> { static constexpr const char* kName = "bool"; };
template <> struct SchemaType<std::optional<int64_t>> {
  static constexpr const char* kName = "int?";
};
template <> struct SchemaType<std::optional<double>> {
  static constexpr const char* kName = "float?";
};
// clang-format on

template <class Function>
struct Interface;
template <class... Args>
struct Interface<void(Args...)> {  // ops are destination-passing: they return nothing
  static constexpr const char* kTypes[] = {SchemaType<Args>::kName..., nullptr};
};

// What core's definitions demand of every tensor: a contiguous last dimension, and where the op
// writes, no element that is there twice.
inline void check_argument(const Tensor& t) { check_last_dim_contiguous("opmux", t); }
inline void check_argument(const std::optional<Tensor>& t) {
  if (t.has_value()) check_argument(*t);
}
template <class Scalar>
void check_argument(const Scalar&) {}

inline void check_written(const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i) {
    check(t.stride(i) != 0 || t.size(i) <= 1, "opmux", "a written tensor must not be expanded");
  }
}
inline void check_written(const std::optional<Tensor>& t) {
  if (t.has_value()) check_written(*t);
}

template <auto function>
struct Guarded;
template <class... Args, void (*function)(Args...)>
struct Guarded<function> {
  template <class Arg>
  static void check_one(const std::remove_reference_t<Arg>& value) {
    check_argument(value);
    constexpr bool kWritten =
        std::is_same_v<Arg, Tensor> || std::is_same_v<Arg, std::optional<Tensor>>;
    if constexpr (kWritten) check_written(value);
  }
  static void call(Args... args) {
    (check_one<Args>(args), ...);
    function(std::forward<Args>(args)...);
  }
};

}  // namespace opmux

// The section holds pointers, not entries: the compiler may pad a structure, never a pointer.
#define OPMUX_SECTION_ENTRY(section_name, pointer_type, id, address) \
  __attribute__((section(section_name), used)) static pointer_type const id = address

#define OPMUX_OP(name, function)                            \
  static constexpr ::opmux::OpEntry name##_op_entry = {     \
      #name, TORCH_BOX(&::opmux::Guarded<&function>::call), \
      ::opmux::Interface<decltype(function)>::kTypes};      \
  OPMUX_SECTION_ENTRY("opmux_ops", const ::opmux::OpEntry*, name##_op_pointer, &name##_op_entry)
