// Common to the files of the Python module edgeformer._native.
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
  py::object packed;  // the array with the engine's weights, if another engine packed them
  Engine engine;
  PyEngine(ProgramSpec spec, const Kernels& k, int threads, int64_t context, int64_t prefill)
      : engine(std::move(spec), k, threads, context, prefill) {}
};

// Marks states as in use for the time of a call; refuses a state that another call uses.
class InUse {
 public:
  explicit InUse(const std::vector<State*>& states);
  ~InUse() { release(); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  void release();
  std::vector<State*> taken_;
};

struct PyState {
  std::shared_ptr<PyEngine> owner;
  State state;
};

struct PyChunk {
  std::shared_ptr<PyEngine> owner;
  KvChunk chunk;
};

// program.cpp: the program of edgeformer/engines/native/program/program.py, and its weights. Exceptions: errors.py's.
std::shared_ptr<PyEngine> make_engine(const py::dict& program, int threads, const std::string& isa,
                                      const std::string& kv, int64_t context, int64_t prefill_rows);
std::vector<bool> pack(PyEngine& self, const std::vector<py::object>& items);
void use_packed(PyEngine& self, const py::array& bytes);
void copy_packed(PyEngine& self, const py::array& bytes, bool mapped);

// forward.cpp
py::list forward(const std::shared_ptr<PyEngine>& self, const std::vector<PyState*>& states,
                 const std::vector<py::list>& inputs);

// state.cpp
std::unique_ptr<PyChunk> load_chunk(std::shared_ptr<PyEngine> self, const py::buffer& bytes);
void bind_state(py::module_& m);

void bind_sampling(py::module_& m);        // sampling.cpp
void bind_testing(py::module_& parent);    // testing.cpp
void bind_pool(py::module_& testing);      // pool.cpp
void bind_kv_cache(py::module_& testing);  // kv_cache.cpp

}  // namespace edgeformer
