// edgeformer._native.State: the KV caches of one sequence, or of one batch of them.
#include <stdexcept>

#include "bindings/bindings.h"
#include "platform/process.h"

namespace edgeformer {

InUse::InUse(const std::vector<State*>& states) {
  const int64_t me = process_id();
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
  for (auto& c : self.state.caches) {
    if (length != 0 && length < c->shortest()) {
      raise("StateError", text("truncate to ", length,
                               " tokens: a sliding window has dropped keys that the next token would see; the ",
                               "state can be cut to ", c->shortest(), " or more tokens, or to 0"));
    }
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

// Row i becomes a fork of what row rows[i] was; there may be more or fewer rows than before. Forks are made first: if
// one fails, nothing has changed; the last row that wants a cache takes it as it is.
void select_state(PyState& self, const std::vector<int64_t>& rows) {
  const InUse use({&self.state});
  auto& current = self.state.caches;
  const auto count = static_cast<int64_t>(current.size());
  std::vector<int64_t> wanted(current.size());
  for (const int64_t r : rows) {
    if (r < 0 || r >= count) raise("InputError", text("select row ", r, ", the state holds ", count, " sequences"));
    ++wanted[r];
  }
  if (rows.empty()) raise("InputError", text("select no rows, the state holds ", count, " sequences"));
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

std::unique_ptr<PyChunk> chunk_of(PyState& self, int64_t index) {
  const InUse use({&self.state});
  const int64_t full = self.state.length() / kChunkTokens;
  if (self.state.caches.size() > 1) {
    raise("InputError", text("chunks are of one sequence, the state holds ", self.state.caches.size()));
  }
  if (index < 0 || index >= full)
    raise("InputError", text("chunk ", index, ", the state holds ", full, " full chunks"));
  return std::make_unique<PyChunk>(PyChunk{self.owner, self.state.caches[0]->chunk(index)});
}

int64_t restore_state(PyState& self, const std::vector<const PyChunk*>& given, int64_t length) {
  const InUse use({&self.state});
  if (self.state.length() != 0) {
    raise("StateError", text("restore to a state of ", self.state.length(), " tokens, it must be empty"));
  }
  std::vector<const KvChunk*> chunks;
  for (const PyChunk* c : given) {
    if (!c || c->owner != self.owner) raise("StateError", "the chunk belongs to another engine");
    chunks.push_back(&c->chunk);
  }
  auto cache = self.owner->engine.new_cache();
  int64_t restored = 0;
  try {
    restored = cache->restore(chunks, length);
  } catch (const std::invalid_argument& e) {
    raise("InputError", e.what());
  }
  self.state.caches.clear();
  self.state.caches.push_back(std::move(cache));
  return restored;
}

py::bytes save_chunk(const PyChunk& self) {
  const std::vector<uint8_t> bytes = self.owner->engine.new_cache()->save_chunk(self.chunk);
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

template <size_t (KvCache::*bytes)() const>
size_t state_bytes(const PyState& self) {
  size_t total = 0;
  for (const auto& c : self.state.caches) total += (c.get()->*bytes)();
  return total;
}

int64_t shortest(const PyState& self) { return self.state.caches.empty() ? 0 : self.state.caches[0]->shortest(); }

}  // namespace

std::unique_ptr<PyChunk> load_chunk(std::shared_ptr<PyEngine> self, const py::buffer& bytes) {
  const py::buffer_info view = bytes.request();
  if (view.ndim != 1 || view.itemsize != 1 || (view.size && view.strides[0] != 1)) {
    raise("InputError", "a saved chunk is contiguous bytes");
  }
  try {
    KvChunk chunk = self->engine.new_cache()->load_chunk(static_cast<const uint8_t*>(view.ptr), size_t(view.size));
    return std::make_unique<PyChunk>(PyChunk{std::move(self), std::move(chunk)});
  } catch (const std::invalid_argument& e) {
    raise("StateError", text("the saved chunk does not fit this model: ", e.what()));
  }
}

void bind_state(py::module_& m) {
  py::class_<PyChunk>(m, "KvChunk", "The keys and values of 128 tokens, immutable; made by State.chunk().")
      .def_property_readonly("nbytes", [](const PyChunk& c) { return c.chunk.bytes(); })
      .def("save", &save_chunk);
  py::class_<PyState>(m, "State", "The KV cache of one sequence (or one batch of them); made by Engine.new_state().")
      .def_property_readonly("length", [](const PyState& s) { return s.state.length(); })
      .def_property_readonly("batch", [](const PyState& s) { return s.state.caches.size(); })
      .def_property_readonly("nbytes", &state_bytes<&KvCache::bytes_alone>)
      .def_property_readonly("nbytes_shared", &state_bytes<&KvCache::bytes_shared>)
      .def_property_readonly("shortest", &shortest)
      .def("truncate", &truncate_state, py::arg("length"))
      .def("fork", &fork_state)
      .def("select", &select_state, py::arg("rows"))
      .def("chunk", &chunk_of, py::arg("index"))
      .def("restore", &restore_state, py::arg("chunks"), py::arg("length"))
      .def("save", &save_state)
      .def("load", &load_state, py::arg("parts"));
}

}  // namespace edgeformer
