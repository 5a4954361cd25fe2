// Engine.forward: checks the arrays of Python, makes those of the results, and runs the engine without the GIL.
#include <algorithm>
#include <stdexcept>

#include "bindings/bindings.h"
#include "platform/process.h"

namespace edgeformer {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

// Where a symbol got its value: axis `axis` of input `input`.
struct Source {
  int input = -1;
  int axis = 0;
};

std::string axis_text(const ProgramSpec& spec, const Source& s) {
  return text("axis ", s.axis, " of ", spec.slots[spec.inputs[s.input]].name);
}

// Binds the symbols of a call, one after another, and refuses sizes that contradict each other.
class Symbols {
 public:
  Symbols(const ProgramSpec& spec, std::vector<int64_t>* values)
      : spec_(spec), values_(*values), sources_(spec.symbols.size()) {
    values_.assign(spec.symbols.size(), 0);
  }

  // `size` is a number or a symbol: the sizes of inputs are.
  void bind(const SizeExpr& size, int64_t got, const Source& here) {
    if (size.code[0] == 0) {
      if (got != size.code[1]) {
        raise("InputError", text(axis_text(spec_, here), " is ", got, ", expected ", size.code[1]));
      }
      return;
    }
    const int64_t s = size.code[1];
    if (sources_[s].input < 0) {
      sources_[s] = here;
      values_[s] = got;
    } else if (values_[s] != got) {
      raise("InputError", text(axis_text(spec_, here), " is ", got, " but ", axis_text(spec_, sources_[s]), " is ",
                               values_[s], "; both are '", spec_.symbols[s], "'"));
    }
  }

 private:
  const ProgramSpec& spec_;
  std::vector<int64_t>& values_;
  std::vector<Source> sources_;
};

bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// The data of input `i`, with its shape's symbols bound.
const void* read_input(const ProgramSpec& spec, size_t i, const py::array& a, std::vector<int64_t>* shape,
                       Symbols* symbols) {
  const SlotSpec& slot = spec.slots[spec.inputs[i]];
  const char kind = slot.dtype == DType::f32 ? 'f' : slot.dtype == DType::i64 ? 'i' : 'b';
  const py::ssize_t width = slot.dtype == DType::f32 ? 4 : slot.dtype == DType::i64 ? 8 : 1;
  if (a.dtype().kind() != kind || a.itemsize() != width || !(a.flags() & py::array::c_style)) {
    raise("InputError", text(slot.name, " has dtype ", py::str(a.dtype()).cast<std::string>(), ", expected contiguous ",
                             kind == 'f'   ? "float32"
                             : kind == 'i' ? "int64"
                                           : "bool"));
  }
  shape->assign(a.shape(), a.shape() + a.ndim());
  if (shape->size() != slot.shape.size()) {
    raise("InputError", text(slot.name, " has shape ", shape_text(*shape), ", expected ", slot.shape.size(), " axes"));
  }
  for (size_t d = 0; d < shape->size(); ++d) {
    const int64_t size = (*shape)[d];
    if (size == 0) raise("InputError", text(slot.name, " has shape ", shape_text(*shape), ": nothing to compute"));
    symbols->bind(spec.sizes[slot.shape[d]], size, {static_cast<int>(i), static_cast<int>(d)});
  }
  if (slot.dtype == DType::i64 && ends_with(slot.name, "input_ids")) {
    // ONNX's Gather takes -1 as the last row. Ids above the table are refused where it is read.
    const auto* ids = static_cast<const int64_t*>(a.data());
    const int64_t least = a.size() ? *std::min_element(ids, ids + a.size()) : 0;
    if (least < 0) raise("InputError", text(slot.name, " holds the token id ", least, ", expected at least 0"));
  }
  return a.data();
}

Call read_call(const Engine& engine, PyState& state, const py::list& arrays) {
  const ProgramSpec& spec = engine.spec();
  Call c;
  c.state = &state.state;
  Symbols symbols(spec, &c.symbols);
  if (arrays.size() != spec.inputs.size()) {
    raise("InputError", text(arrays.size(), " inputs, expected ", spec.inputs.size()));
  }
  c.shapes.resize(spec.inputs.size());
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    const void* data = read_input(spec, i, py::reinterpret_borrow<py::array>(arrays[i]), &c.shapes[i], &symbols);
    c.inputs.push_back(data);
    if (!c.shapes[i].empty()) continue;
    const std::string& name = spec.slots[spec.inputs[i]].name;
    for (size_t s = 0; s < spec.symbols.size(); ++s) {
      if (spec.symbols[s] == name) c.symbols[s] = *static_cast<const int64_t*>(data);
    }
  }
  if (spec.batch_symbol >= 0) {
    c.batch = c.symbols[spec.batch_symbol];
    c.rows = c.symbols[spec.sequence_symbol];
  }
  if (spec.logits_to_keep >= 0) {
    c.logits_to_keep = *static_cast<const int64_t*>(c.inputs[spec.logits_to_keep]);
    if (c.logits_to_keep < 0) {
      raise("InputError", text("logits_to_keep is ", c.logits_to_keep, ", expected 0 (all) or more"));
    }
  }
  c.symbols[spec.kept_symbol] = c.kept();
  if (spec.past_symbol >= 0) c.symbols[spec.past_symbol] = state.state.length();
  if (!spec.caches.empty()) {
    const int64_t length = state.state.length(), batch = static_cast<int64_t>(state.state.caches.size());
    if (length > 0 && batch != c.batch) {
      raise("InputError", text("the inputs have ", c.batch, " sequences, the state holds ", batch));
    }
    if (length + c.rows > engine.context()) {
      raise("InputError", text("the state holds ", length, " tokens and the call brings ", c.rows,
                               "; the engine was loaded for a context of ", engine.context(),
                               "; truncate the state or load with a larger context"));
    }
  }
  return c;
}

// Appends an array of shape shapes[i] to each results[i]; they lie one behind another, from the returned address on.
void* add_arrays(DType type, const std::vector<std::vector<int64_t>>& shapes, const py::list& results) {
  const py::dtype dtype(type == DType::f32 ? "float32" : type == DType::i64 ? "int64" : "bool");
  py::ssize_t total = 0;
  for (const auto& shape : shapes) {
    py::ssize_t count = 1;
    for (int64_t d : shape) count *= d;
    total += count;
  }
  py::array base(dtype, std::vector<py::ssize_t>{total});
  auto* const first = static_cast<uint8_t*>(base.mutable_data());
  uint8_t* at = first;
  for (size_t i = 0; i < shapes.size(); ++i) {
    py::array view(dtype, std::vector<py::ssize_t>(shapes[i].begin(), shapes[i].end()), at, base);
    results[i].cast<py::list>().append(view);
    at += view.nbytes();
  }
  return first;
}

// Whether this is the thread in which Python runs signal handlers.
bool is_main_thread() {
  static int64_t process = -1;  // both under the GIL
  static unsigned long main = 0;
  if (process != process_id()) {
    main = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    process = process_id();
  }
  return PyThread_get_thread_ident() == main;
}

}  // namespace

py::list forward(const std::shared_ptr<PyEngine>& self, const std::vector<PyState*>& states,
                 const std::vector<py::list>& inputs) {
  Engine& engine = self->engine;
  const ProgramSpec& spec = engine.spec();
  if (states.size() != inputs.size()) {
    raise("InputError", text(states.size(), " states and ", inputs.size(), " sets of inputs, expected as many"));
  }
  std::vector<State*> marked;
  for (PyState* s : states) {
    if (!s || s->owner != self) raise("StateError", "the state belongs to another model; make one with new_state()");
    marked.push_back(&s->state);
  }
  const InUse use(marked);
  std::vector<Call> calls;
  for (size_t i = 0; i < states.size(); ++i) calls.push_back(read_call(engine, *states[i], inputs[i]));
  py::list results;
  for (size_t i = 0; i < calls.size(); ++i) results.append(py::list());
  if (calls.empty()) return results;

  std::vector<void*> memory;
  for (size_t o = 0; o < spec.outputs.size(); ++o) {
    std::vector<std::vector<int64_t>> shapes;
    for (const Call& c : calls) shapes.push_back(engine.output_shape(c, o));
    memory.push_back(add_arrays(spec.slots[spec.outputs[o]].dtype, shapes, results));
  }
  void* likeliest = nullptr;
  if (engine.logits_output() >= 0) {
    std::vector<std::vector<int64_t>> shapes;
    for (const Call& c : calls) {
      shapes.push_back(engine.output_shape(c, engine.logits_output()));
      shapes.back().pop_back();
    }
    likeliest = add_arrays(DType::i64, shapes, results);
  }
  // Python's handlers of signals, Ctrl-C's among them, run between operations; what one raises stays set in this thread.
  auto signals = [] {
    const py::gil_scoped_acquire held;
    return PyErr_CheckSignals() != 0;
  };
  FunctionRef<bool()> ask(signals);
  const bool polls = is_main_thread();
  try {
    py::gil_scoped_release release;
    engine.forward(calls, memory, static_cast<int64_t*>(likeliest), polls ? &ask : nullptr);
  } catch (const Interrupted&) {
    throw py::error_already_set();
  } catch (const Reentered&) {
    raise("StateError",
          "a signal handler called the model while the interrupted call runs; set a flag there, and call "
          "the model after that call");
  } catch (const InputProblem& e) {
    raise("InputError", e.what());
  } catch (const std::length_error& e) {
    raise("InputError", e.what());
  }
  return results;
}

}  // namespace edgeformer
