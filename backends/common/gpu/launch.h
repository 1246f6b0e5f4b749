// SPDX-License-Identifier: Apache-2.0
// Launches of kernels: types checked, errors as exceptions, no synchronisation.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "gpu.h"

namespace opmux::gpu {

struct Launch {
  const char* op;  // named in errors
  Stream stream;
  int64_t blocks;
  int threads;    // a multiple of kBlockUnit
  int group = 1;  // blocks that share a row; divides blocks
};

template <class... Params, size_t... kIndex>
void launch_with(const Launch& at, void (*kernel)(Params...), std::tuple<Params...> values,
                 std::index_sequence<kIndex...>) {
  if (at.blocks <= 0) return;
  if (at.blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(at.op) + ": more work than one launch can hold");
  }
  void* args[] = {static_cast<void*>(&std::get<kIndex>(values))...};
  const char* error =
      vendor::launch(kernel, static_cast<unsigned>(at.blocks), static_cast<unsigned>(at.threads),
                     static_cast<unsigned>(at.group), at.stream, args);
  if (error != nullptr) throw std::runtime_error(std::string(at.op) + ": launch: " + error);
}

template <class... Params, class... Args>
void launch(const Launch& at, void (*kernel)(Params...), const Args&... args) {
  launch_with(at, kernel, std::tuple<Params...>(args...), std::index_sequence_for<Params...>{});
}

// Calls f(TypeTag<T>) for the type.
template <class F>
void for_float_type(FloatType type, const F& f) {
  switch (type) {
    case FloatType::kFloat32:
      return f(TypeTag<float>{});
    case FloatType::kBFloat16:
      return f(TypeTag<bfloat16>{});
    case FloatType::kFloat16:
      return f(TypeTag<float16>{});
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Threads that the device runs at a time.
inline int64_t resident_threads() {
  const vendor::Device& d = vendor::device();
  return static_cast<int64_t>(d.processors) * d.threads_per_processor;
}

}  // namespace opmux::gpu
