// SPDX-License-Identifier: Apache-2.0
// What a backend library exports is built from these: registration with errors as text, where
// torch's own registration macros would abort or crash inside dlopen. Included by one file.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "opmux/op.h"

#define OPMUX_EXPORT extern "C" __attribute__((visibility("default")))

// Made by the linker: the bounds of the section that OPMUX_OP fills.
extern "C" __attribute__((visibility("hidden"))) const opmux::OpEntry* const __start_opmux_ops[];
extern "C" __attribute__((visibility("hidden"))) const opmux::OpEntry* const __stop_opmux_ops[];

namespace opmux {

inline std::vector<const OpEntry*> sorted_ops() {
  std::vector<const OpEntry*> ops(__start_opmux_ops, __stop_opmux_ops);
  std::sort(ops.begin(), ops.end(),
            [](const OpEntry* a, const OpEntry* b) { return std::strcmp(a->name, b->name) < 0; });
  return ops;
}

// Registers every op of this library in namespace `ns` under one dispatch key. Returns nullptr,
// or an error text that stays valid. A failure leaves nothing registered; a namespace that was
// registered before is left as it is.
inline const char* register_ops(const char* ns, const char* dispatch_key) {
  static std::string error;
  static auto* registered = new std::vector<std::string>;  // never destroyed: ops outlive statics
  try {
    if (std::find(registered->begin(), registered->end(), ns) != registered->end()) return nullptr;
    TorchLibraryHandle library = nullptr;
    if (aoti_torch_library_init_impl(ns, dispatch_key, __FILE__, __LINE__, &library) != 0) {
      error = std::string("torch refused the namespace ") + ns;
      return error.c_str();
    }
    struct Deleter {
      void operator()(TorchLibraryOpaque* handle) const {
        aoti_torch_delete_library_object(handle);
      }
    };
    std::unique_ptr<TorchLibraryOpaque, Deleter> owner(library);
    for (const OpEntry* op : sorted_ops()) {
      if (torch_library_impl(library, op->name, op->boxed, TORCH_ABI_VERSION) != 0) {
        error = std::string("torch refused the implementation of ") + ns + "::" + op->name;
        return error.c_str();
      }
    }
    registered->push_back(ns);
    owner.release();  // lives as long as the process
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

// One line per op, such as "silu_and_mul(Tensor,Tensor!)".
inline const char* interface_text() {
  static const std::string text = [] {
    std::string lines;
    for (const OpEntry* op : sorted_ops()) {
      lines += op->name;
      char separator = '(';
      for (const char* const* type = op->types; *type != nullptr; ++type) {
        lines += separator;
        lines += *type;
        separator = ',';
      }
      lines += ")\n";
    }
    return lines;
  }();
  return text.c_str();
}

}  // namespace opmux
