// SPDX-License-Identifier: Apache-2.0
// The vendor's Python module: pointers as integers, or tensors by DLPack. It knows nothing of
// opmux, whose definitions have checked shapes, dtypes and devices before a call arrives here.
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "acme.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void silu_and_mul(uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t rows,
                  int64_t d, acme::Type type) {
  acme::silu_and_mul(at<const void>(x), x_stride, at<void>(out), out_stride, rows, d, type);
}

void fused_add_rmsnorm(uintptr_t x, uintptr_t residual, uintptr_t weight, int64_t rows, int64_t h,
                       double eps, acme::Type type) {
  acme::fused_add_rmsnorm(at<void>(x), at<void>(residual), at<const void>(weight), rows, h, eps,
                          type);
}

// Borrows: the capsule keeps its name, so its owner frees it after the call.
const DLTensor& tensor(const py::capsule& capsule) {
  return static_cast<DLManagedTensor*>(capsule.get_pointer())->dl_tensor;
}

acme::Type type_of(const DLTensor& t) {
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return acme::Type::kFloat32;
  if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) return acme::Type::kBFloat16;
  throw std::invalid_argument("acme: dtype must be float32 or bfloat16");
}

// Row r of a tensor, in elements from its start: the leading dimensions may have any strides.
int64_t row_offset(const DLTensor& t, int64_t r) {
  int64_t offset = 0;
  for (int i = t.ndim - 2; i >= 0; --i) {
    offset += r % t.shape[i] * t.strides[i];
    r /= t.shape[i];
  }
  return offset;
}

char* start(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

void rmsnorm(const py::capsule& x_capsule, const py::capsule& weight_capsule, double eps,
             const py::capsule& out_capsule) {
  const DLTensor& x = tensor(x_capsule);
  const DLTensor& out = tensor(out_capsule);
  const char* weight = start(tensor(weight_capsule));
  const acme::Type type = type_of(x);
  const int64_t item = x.dtype.bits / 8;
  int64_t rows = 1;
  for (int i = 0; i < x.ndim - 1; ++i) rows *= x.shape[i];
  for (int64_t r = 0; r < rows; ++r) {
    acme::rmsnorm(start(x) + row_offset(x, r) * item, 0, weight,
                  start(out) + row_offset(out, r) * item, 0, 1, x.shape[x.ndim - 1], eps, type);
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::enum_<acme::Type>(m, "Type")
      .value("float32", acme::Type::kFloat32)
      .value("bfloat16", acme::Type::kBFloat16);
  // Without the GIL: the functions see memory alone.
  m.def("silu_and_mul", &silu_and_mul, py::call_guard<py::gil_scoped_release>());
  m.def("fused_add_rmsnorm", &fused_add_rmsnorm, py::call_guard<py::gil_scoped_release>());
  m.def("rmsnorm", &rmsnorm);
}
