// edgeformer._native.State: the KV caches of one sequence, or of one batch of them.
#include <unistd.h>

#include <stdexcept>

#include "bindings/bindings.h"

namespace edgeformer {

InUse::InUse(const std::vector<State*>& states) {
  const int64_t me = getpid();
  for (State* s : states) {
    int64_t seen = s->user.load();
    // A mark of another process is of a thread that fork() did not copy.
    if (seen == me || !s->user.compare_exchange_strong(seen, me)) {
      release();
      raise("StateError",
            "this state is in use by another call (or is given twice in one batch); give each thread a "
            "state of its own, made by new_state() or fork()");
    }
    taken_.push_back(s);
  }
}

void InUse::release() {
  for (State* s : taken_) s->user.store(0);
  taken_.clear();
}

namespace {

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

// Row i becomes a copy of what row rows[i] was. Copies are made first: if one fails, nothing has changed; the
// last row that wants a cache takes it without a copy.
void select_state(PyState& self, const std::vector<int64_t>& rows) {
  const InUse use({&self.state});
  auto& current = self.state.caches;
  const auto count = static_cast<int64_t>(current.size());
  std::vector<int64_t> wanted(current.size());
  for (const int64_t r : rows) {
    if (r < 0 || r >= count) raise("InputError", text("select row ", r, ", the state holds ", count, " sequences"));
    ++wanted[r];
  }
  if (rows.size() != current.size()) {
    raise("InputError", text("select ", rows.size(), " rows, the state holds ", count, " sequences"));
  }
  std::vector<std::unique_ptr<KvCache>> caches(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    if (--wanted[rows[i]] > 0) caches[i] = std::make_unique<KvCache>(current[rows[i]]->fork());
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!caches[i]) caches[i] = std::move(current[rows[i]]);
  }
  current = std::move(caches);
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

}  // namespace

void bind_state(py::module_& m) {
  py::class_<PyState>(m, "State", "The KV cache of one sequence (or one batch of them); made by Engine.new_state().")
      .def_property_readonly("length", [](const PyState& s) { return s.state.length(); })
      .def_property_readonly("batch", [](const PyState& s) { return s.state.caches.size(); })
      .def_property_readonly("nbytes", &state_bytes)
      .def("truncate", &truncate_state, py::arg("length"))
      .def("fork", &fork_state)
      .def("select", &select_state, py::arg("rows"))
      .def("save", &save_state)
      .def("load", &load_state, py::arg("parts"));
}

}  // namespace edgeformer
