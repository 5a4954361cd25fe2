// What the files of the Python module share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace py = pybind11;

namespace edgeformer {

// A Python exception of edgeformer.errors.
[[noreturn]] inline void raise(const char* type, const std::string& message) {
  py::object cls = py::module_::import("edgeformer.errors").attr(type);
  PyErr_SetString(cls.ptr(), message.c_str());
  throw py::error_already_set();
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

struct PyEngine {
  py::object packed;  // the array that the engine's weights lie in, if it did not pack them itself
  Engine engine;
  PyEngine(ProgramSpec spec, const Kernels& k, int threads, int64_t context, int64_t prefill)
      : engine(std::move(spec), k, threads, context, prefill) {}
};

struct PyState {
  std::shared_ptr<PyEngine> owner;
  State state;
};

// bindings_program.cpp: the program as native/engine.py gives it, and its weights. Both refuse with an exception.
std::shared_ptr<PyEngine> make_engine(const py::dict& program, int threads, const std::string& isa,
                                      const std::string& kv, int64_t context, int64_t prefill_rows);
std::vector<bool> pack(PyEngine& self, const std::vector<py::tuple>& pieces);
void use_packed(PyEngine& self, const py::array& bytes);

void bind_testing(py::module_& parent);  // bindings_testing.cpp
void bind_pool(py::module_& testing);    // bindings_pool.cpp

}  // namespace edgeformer
