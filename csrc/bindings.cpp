// The Python module edgeformer._native.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"

namespace py = pybind11;

namespace edgeformer {
void bind_testing(py::module_& parent);  // bindings_testing.cpp
}  // namespace edgeformer

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C++ half of edgeformer's native engine.";
  m.def(
      "cpu_features",
      [] {
        py::dict features;
        for (const auto& [name, present] : edgeformer::cpu_features()) features[py::str(name)] = present;
        return features;
      },
      "Each CPU feature that a kernel table asks for, and whether this CPU and its OS offer it.");
  m.def("isas", &edgeformer::usable_isas, "Names of the kernel tables that run here, best first.");
  m.def("built_isas", &edgeformer::built_isas, "Names of the kernel tables in this build, best first.");
  edgeformer::bind_testing(m);
}
