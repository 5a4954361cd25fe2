// The Python module edgeformer._native. Everything that comes from outside is checked here; below is only debug
// asserts.
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <stdexcept>

#include "bindings/bindings.h"
#include "engine/dispatch.h"

namespace edgeformer {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

// Marks states as in use for the time of a call; a state in use by another thread is refused.
class InUse {
 public:
  explicit InUse(const std::vector<State*>& states) {
    const int64_t me = getpid();
    for (State* s : states) {
      int64_t seen = s->user.load();
      // A mark of another process is of a thread that fork() did not copy.
      if (seen == me || !s->user.compare_exchange_strong(seen, me)) {
        release();
        raise("StateError",
              "this state is in use by another call (or stands twice in one batch); give each thread a "
              "state of its own, made by new_state() or fork()");
      }
      taken_.push_back(s);
    }
  }
  ~InUse() { release(); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  void release() {
    for (State* s : taken_) s->user.store(0);
    taken_.clear();
  }
  std::vector<State*> taken_;
};

// -- states -----------------------------------------------------------------------------------------------------------

std::unique_ptr<PyState> new_state(std::shared_ptr<PyEngine> self) {
  auto s = std::make_unique<PyState>();
  s->owner = std::move(self);
  return s;
}

void truncate_state(PyState& self, int64_t length) {
  const InUse use({&self.state});
  if (length < 0 || length > self.state.length()) {
    raise("InputError", text("truncate to ", length, " tokens, the state holds ", self.state.length()));
  }
  for (auto& c : self.state.caches) c->truncate(length);
}

std::unique_ptr<PyState> fork_state(PyState& self) {
  const InUse use({&self.state});
  auto copy = std::make_unique<PyState>();
  copy->owner = self.owner;
  for (auto& c : self.state.caches) copy->state.caches.push_back(std::make_unique<KvCache>(c->fork()));
  return copy;
}

// Row i becomes a copy of what row rows[i] was. Copies are made first, so that nothing has changed where one fails; the
// last row that wants a cache takes it without a copy.
void select_state(PyState& self, const std::vector<int64_t>& rows) {
  const InUse use({&self.state});
  auto& held = self.state.caches;
  const auto count = static_cast<int64_t>(held.size());
  std::vector<int64_t> wanted(held.size());
  for (const int64_t r : rows) {
    if (r < 0 || r >= count) raise("InputError", text("select row ", r, ", the state holds ", count, " sequences"));
    ++wanted[r];
  }
  if (rows.size() != held.size()) {
    raise("InputError", text("select ", rows.size(), " rows, the state holds ", count, " sequences"));
  }
  std::vector<std::unique_ptr<KvCache>> caches(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    if (--wanted[rows[i]] > 0) caches[i] = std::make_unique<KvCache>(held[rows[i]]->fork());
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!caches[i]) caches[i] = std::move(held[rows[i]]);
  }
  held = std::move(caches);
}

py::list save_state(PyState& self) {
  const InUse use({&self.state});
  py::list parts;
  for (auto& c : self.state.caches) {
    const std::vector<uint8_t> bytes = c->save();
    parts.append(py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
  return parts;
}

void load_state(PyState& self, const std::vector<py::bytes>& parts) {
  const InUse use({&self.state});
  std::vector<std::unique_ptr<KvCache>> caches;
  for (const py::bytes& part : parts) {
    const std::string_view view = part;
    caches.push_back(self.owner->engine.new_cache());
    try {
      caches.back()->load(reinterpret_cast<const uint8_t*>(view.data()), view.size());
    } catch (const std::invalid_argument& e) {
      raise("StateError", text("the saved state does not fit this model: ", e.what()));
    }
  }
  for (const auto& c : caches) {
    if (c->length() != caches[0]->length()) raise("StateError", "the saved state's rows differ in length");
  }
  self.state.caches = std::move(caches);
}

size_t state_bytes(const PyState& self) {
  size_t total = 0;
  for (const auto& c : self.state.caches) total += c->bytes();
  return total;
}

// -- forward ----------------------------------------------------------------------------------------------------------

void bind_size(const ProgramSpec& spec, const SizeExpr& size, int64_t got, const std::string& where,
               std::vector<int64_t>* symbols, std::vector<std::string>* seen) {
  if (size.code[0] == 0) {
    if (got != size.code[1]) raise("InputError", text(where, " is ", got, ", expected ", size.code[1]));
    return;
  }
  const int64_t s = size.code[1];
  std::string& first = (*seen)[s];
  if (first.empty()) {
    first = where;
    (*symbols)[s] = got;
  } else if ((*symbols)[s] != got) {
    raise("InputError",
          text(where, " is ", got, " but ", first, " is ", (*symbols)[s], "; both are '", spec.symbols[s], "'"));
  }
}

Call read_call(const Engine& engine, PyState& state, const py::list& arrays, int64_t keep) {
  const ProgramSpec& spec = engine.spec();
  Call c;
  c.state = &state.state;
  c.keep = keep;
  c.symbols.assign(spec.symbols.size(), 0);
  std::vector<std::string> seen(spec.symbols.size());
  if (arrays.size() != spec.inputs.size()) {
    raise("InputError", text(arrays.size(), " inputs, expected ", spec.inputs.size()));
  }
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    const SlotSpec& slot = spec.slots[spec.inputs[i]];
    const auto a = py::reinterpret_borrow<py::array>(arrays[i]);
    const char kind = slot.dtype == DType::f32 ? 'f' : slot.dtype == DType::i64 ? 'i' : 'b';
    const py::ssize_t width = slot.dtype == DType::f32 ? 4 : slot.dtype == DType::i64 ? 8 : 1;
    if (a.dtype().kind() != kind || a.itemsize() != width || !(a.flags() & py::array::c_style)) {
      raise("InputError",
            text(slot.name, " has dtype ", py::str(a.dtype()).cast<std::string>(), ", expected contiguous ",
                 kind == 'f'   ? "float32"
                 : kind == 'i' ? "int64"
                               : "bool"));
    }
    std::vector<int64_t> shape(a.shape(), a.shape() + a.ndim());
    if (shape.size() != slot.shape.size()) {
      raise("InputError", text(slot.name, " has shape ", shape_text(shape), ", expected ", slot.shape.size(), " axes"));
    }
    for (size_t d = 0; d < shape.size(); ++d) {
      if (shape[d] == 0) raise("InputError", text(slot.name, " has shape ", shape_text(shape), ": nothing to compute"));
      bind_size(spec, spec.sizes[slot.shape[d]], shape[d], text("axis ", d, " of ", slot.name), &c.symbols, &seen);
    }
    for (size_t s = 0; s < spec.symbols.size(); ++s) {
      if (spec.symbols[s] == slot.name && shape.empty()) c.symbols[s] = *static_cast<const int64_t*>(a.data());
    }
    c.inputs.push_back(a.data());
    c.shapes.push_back(std::move(shape));
  }
  if (spec.batch_symbol >= 0) {
    c.batch = c.symbols[spec.batch_symbol];
    c.rows = c.symbols[spec.sequence_symbol];
  }
  if (keep < 0) raise("InputError", text("logits_to_keep is ", keep, ", expected 0 (all) or more"));
  c.symbols[spec.kept_symbol] = keep == 0 ? c.rows : std::min(keep, c.rows);
  if (spec.past_symbol >= 0) c.symbols[spec.past_symbol] = state.state.length();
  if (!spec.caches.empty()) {
    const int64_t length = state.state.length(), held = static_cast<int64_t>(state.state.caches.size());
    if (length > 0 && held != c.batch) {
      raise("InputError", text("the inputs have ", c.batch, " sequences, the state holds ", held));
    }
    if (length + c.rows > engine.context()) {
      raise("InputError", text("the state holds ", length, " tokens and the call brings ", c.rows,
                               "; the engine was loaded for a context of ", engine.context(),
                               "; truncate the state or load with a larger context"));
    }
  }
  return c;
}

py::list forward(const std::shared_ptr<PyEngine>& self, const std::vector<PyState*>& states,
                 const std::vector<py::list>& inputs, const std::vector<int64_t>& keeps) {
  Engine& engine = self->engine;
  const ProgramSpec& spec = engine.spec();
  if (states.size() != inputs.size() || states.size() != keeps.size()) raise("InputError", "lists of unequal length");
  std::vector<State*> marked;
  for (PyState* s : states) {
    if (!s || s->owner != self) raise("StateError", "the state belongs to another model; make one with new_state()");
    marked.push_back(&s->state);
  }
  const InUse use(marked);
  std::vector<Call> calls;
  for (size_t i = 0; i < states.size(); ++i) calls.push_back(read_call(engine, *states[i], inputs[i], keeps[i]));
  py::list results;
  for (size_t i = 0; i < calls.size(); ++i) results.append(py::list());
  if (calls.empty()) return results;

  std::vector<void*> memory;
  for (size_t o = 0; o < spec.outputs.size(); ++o) {
    const DType type = spec.slots[spec.outputs[o]].dtype;
    const py::dtype dtype(type == DType::f32 ? "float32" : type == DType::i64 ? "int64" : "bool");
    std::vector<std::vector<int64_t>> shapes;
    py::ssize_t total = 0;
    for (const Call& c : calls) {
      shapes.push_back(engine.output_shape(c, o));
      py::ssize_t count = 1;
      for (int64_t d : shapes.back()) count *= d;
      total += count;
    }
    py::array base(dtype, std::vector<py::ssize_t>{total});
    auto* at = static_cast<uint8_t*>(base.mutable_data());
    memory.push_back(at);
    for (size_t i = 0; i < calls.size(); ++i) {
      const std::vector<py::ssize_t> shape(shapes[i].begin(), shapes[i].end());
      py::array view(dtype, shape, at, base);
      results[i].cast<py::list>().append(view);
      at += view.nbytes();
    }
  }
  try {
    py::gil_scoped_release release;
    engine.forward(calls, memory);
  } catch (const InputProblem& e) {
    raise("InputError", e.what());
  } catch (const std::length_error& e) {
    raise("InputError", e.what());
  }
  return results;
}

// Gives freed memory back to the system: what reading a model took would else stay beside its packed weights.
void trim_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

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

}  // namespace
}  // namespace edgeformer

PYBIND11_MODULE(_native, m) {
  using namespace edgeformer;  // NOLINT
  m.doc() = "The C++ half of edgeformer's native engine.";
  m.def(
      "cpu_features",
      [] {
        py::dict features;
        for (const auto& [name, present] : cpu_features()) features[py::str(name)] = present;
        return features;
      },
      "Each CPU feature that a kernel table asks for, and whether this CPU and its OS offer it.");
  m.def("isas", &usable_isas, "Names of the kernel tables that run here, best first.");
  m.def("trim_memory", &trim_memory, "Give freed memory back to the system, where the C library knows how.");
  m.def("built_isas", &built_isas, "Names of the kernel tables in this build, best first.");

  py::class_<PyState>(m, "State", "What one sequence (or one batch of them) owns; made by Engine.new_state().")
      .def_property_readonly("length", [](const PyState& s) { return s.state.length(); })
      .def_property_readonly("batch", [](const PyState& s) { return s.state.caches.size(); })
      .def_property_readonly("nbytes", &state_bytes)
      .def("truncate", &truncate_state, py::arg("length"))
      .def("fork", &fork_state)
      .def("select", &select_state, py::arg("rows"))
      .def("save", &save_state)
      .def("load", &load_state, py::arg("parts"));

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
      .def("pack", &pack, py::arg("pieces"))
      .def("use_packed", &use_packed, py::arg("bytes"))
      .def("packed", &packed)
      .def_property_readonly("packed_size", [](const PyEngine& e) { return e.engine.packed_size(); })
      .def("new_state", &new_state)
      .def("forward", &forward, py::arg("states"), py::arg("inputs"), py::arg("keeps"));
  bind_testing(m);
}
