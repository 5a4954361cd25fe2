// The Python module edgeformer._native. The bindings check all that comes from Python; the layers below only assert.
#include <memory>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "engine/dispatch.h"
#include "platform/cpu.h"
#include "platform/memory.h"

namespace edgeformer {
namespace {

// The packed weights as uint8[packed_size], without a copy and read-only; they live as long as the array does.
py::array packed(const py::object& self) {
  const auto& engine = self.cast<const PyEngine&>().engine;
  const size_t size = engine.packed() ? engine.packed_size() : 0;
  py::array view(py::dtype("uint8"), std::vector<py::ssize_t>{static_cast<py::ssize_t>(size)}, engine.packed(), self);
  view.attr("flags").attr("writeable") = false;
  return view;
}

size_t scratch_bytes(PyEngine& self, const std::vector<int64_t>& symbols, int64_t rows, int64_t past) {
  if (symbols.size() != self.engine.spec().symbols.size()) raise("InputError", "one number for each symbol is needed");
  return self.engine.scratch_bytes(symbols, rows, past);
}

std::unique_ptr<PyState> new_state(std::shared_ptr<PyEngine> self) {
  auto s = std::make_unique<PyState>();
  s->owner = std::move(self);
  return s;
}

py::dict names() {
  py::dict all;
  all["slot"] = names_of(kDTypes);
  all["weight"] = std::vector<std::string>(kWeightTypeNames, kWeightTypeNames + kWeightTypes);
  all["role"] = names_of(kPackRoles);
  all["unary"] = names_of(kUnaryTable);
  all["binary"] = names_of(kBinaries);
  all["pointwise"] = names_of(kPoints);
  all["reduce"] = names_of(kReductions);
  all["scatter"] = names_of(kScatters);
  all["norm"] = names_of(kNorms);
  return all;
}

}  // namespace
}  // namespace edgeformer

PYBIND11_MODULE(_native, m) {
  using namespace edgeformer;  // NOLINT
  m.doc() = "The C++ half of edgeformer's native engine.";
  m.attr("NAMES") = names();  // kind -> the names that a program may use, see program/names.h
  m.attr("LANES") = kLanes;
  m.def(
      "cpu_features",
      [] {
        py::dict features;
        for (const auto& [name, present] : cpu_features()) features[py::str(name)] = present;
        return features;
      },
      "Each CPU feature that a kernel table asks for, and whether this CPU and its OS offer it.");
  m.def("isas", &usable_isas, "Names of the kernel tables that run here, best first.");
  m.def("trim_memory", &trim_heap, "Return freed memory to the system, if the C library can.");
  m.def("built_isas", &built_isas, "Names of the kernel tables in this build, best first.");

  bind_state(m);
  py::class_<PyEngine, std::shared_ptr<PyEngine>>(m, "Engine", "A program with its weights; see native/engine.py.")
      .def(py::init(&make_engine), py::arg("program"), py::arg("threads"), py::arg("isa"), py::arg("kv"),
           py::arg("context"), py::arg("prefill_rows"))
      .def_property_readonly("isa", [](const PyEngine& e) { return e.engine.kernels().isa; })
      .def_property_readonly("threads", [](const PyEngine& e) { return e.engine.threads(); })
      .def_property_readonly("context", [](const PyEngine& e) { return e.engine.context(); })
      .def_property_readonly("weight_bytes", [](const PyEngine& e) { return e.engine.weight_bytes(); })
      .def(
          "kv_bytes", [](const PyEngine& e, int64_t tokens) { return e.engine.kv_bytes(tokens); }, py::arg("tokens"))
      .def("scratch_bytes", &scratch_bytes, py::arg("symbols"), py::arg("rows"), py::arg("past"))
      .def(
          "profile",
          [](PyEngine& e, bool on) {
            Engine::Profile p;
            {
              py::gil_scoped_release release;
              p = e.engine.profile(on);
            }
            return py::make_tuple(p.nanoseconds, p.runs);
          },
          py::arg("on"))
      .def("pack", &pack, py::arg("parts"))
      .def("use_packed", &use_packed, py::arg("packed"))
      .def("copy_packed", &copy_packed, py::arg("packed"), py::arg("mapped"))
      .def("packed", &packed)
      .def_property_readonly("packed_size", [](const PyEngine& e) { return e.engine.packed_size(); })
      .def("new_state", &new_state)
      .def("load_chunk", &load_chunk, py::arg("data"))
      .def("forward", &forward, py::arg("states"), py::arg("inputs"));
  bind_sampling(m);
  bind_testing(m);
}
