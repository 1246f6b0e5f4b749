// SPDX-License-Identifier: Apache-2.0
// The test-only extension: a Python module that is an op library too, for tensors on the CPU.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

extern "C" const char* opmux_register(const char* ns);
extern "C" const char* opmux_interface();
extern "C" const char* opmux_info();

PYBIND11_MODULE(OPMUX_SIMT_MODULE, m) {
  m.doc() = "Shared GPU kernels, executed on the CPU.";
  m.attr("warp") = OPMUX_SIMT_WARP;
  m.def("interface", &opmux_interface, "One line per op, derived from the C++ types.");
  m.def(
      "register",
      [](const std::string& ns) {
        if (const char* error = opmux_register(ns.c_str())) throw std::runtime_error(error);
      },
      "Registers every op in a namespace, for the CPU.");
}
