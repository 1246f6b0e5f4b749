// SPDX-License-Identifier: Apache-2.0
// 16-bit floats as storage. Kernels compute in float32; the vendor headers convert.
#pragma once

#include <cstdint>

namespace opmux::gpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Bytes that one memory instruction moves at best: 16 on every device so far but the newest.
constexpr int kVectorBytes = 16;

template <class T>
struct TypeTag {
  using Type = T;
};

}  // namespace opmux::gpu
