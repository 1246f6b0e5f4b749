// SPDX-License-Identifier: Apache-2.0
// The floating types that kernels compute on. Free of torch: device compilers read it too.
#pragma once

namespace opmux {

enum class FloatType : int { kFloat32, kBFloat16, kFloat16 };
constexpr int kFloatTypes = 3;

}  // namespace opmux
