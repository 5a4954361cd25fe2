// From Python's description of a program to an engine, and from a model file's arrays to packed weights.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "bindings/bindings.h"
#include "engine/dispatch.h"
#include "platform/memory.h"

namespace edgeformer {
namespace {

template <class T>
T field(const py::handle& item, const char* name) {
  return item[name].cast<T>();
}

SlotSpec read_slot(const py::handle& item) {
  SlotSpec s;
  s.name = field<std::string>(item, "name");
  s.dtype = value_named(kDTypes, "slot type", field<std::string>(item, "dtype"));
  s.shape = field<std::vector<int>>(item, "shape");
  s.view_of = field<int>(item, "view_of");
  if (s.shape.size() > kMaxRank) {
    raise("EngineUnavailable",
          text(s.name, " has rank ", s.shape.size(), ", the native engine supports up to ", kMaxRank));
  }
  const py::object constant = item["constant"];
  if (!constant.is_none()) {
    const auto bytes = constant.cast<py::buffer>().request();
    const auto* data = static_cast<const uint8_t*>(bytes.ptr);
    s.constant.assign(data, data + bytes.size * bytes.itemsize);
    s.is_constant = true;
  }
  return s;
}

OpSpec read_op(const py::handle& item) {
  OpSpec op;
  op.kind = field<std::string>(item, "kind");
  op.inputs = field<std::vector<int>>(item, "inputs");
  op.outputs = field<std::vector<int>>(item, "outputs");
  op.weights = field<std::vector<int>>(item, "weights");
  op.ints = field<std::map<std::string, std::vector<int64_t>>>(item, "ints");
  op.floats = field<std::map<std::string, std::vector<double>>>(item, "floats");
  op.names = field<std::map<std::string, std::vector<std::string>>>(item, "names");
  op.sizes = field<std::map<std::string, std::vector<int>>>(item, "sizes");
  return op;
}

KvLayout read_cache(const py::handle& item, KvType kv) {
  const KvLayout l = {field<bool>(item, "plain") ? KvType::float32 : kv, field<int64_t>(item, "kv_heads"),
                      field<int64_t>(item, "head_dim"), field<int64_t>(item, "value_dim")};
  if (l.head_dim > kMaxHeadDim || l.value_dim > kMaxHeadDim) {
    raise("EngineUnavailable", text("attention heads of ", std::max(l.head_dim, l.value_dim),
                                    " columns; the native engine supports up to ", kMaxHeadDim));
  }
  return l;
}

// For each cache the widest window of the operations that read it; 0 if one of them sees all keys.
std::vector<int64_t> windows_of(const ProgramSpec& p) {
  std::vector<int64_t> windows(p.caches.size(), -1);
  for (const OpSpec& op : p.ops) {
    if (op.kind != "attend" && op.kind != "history") continue;
    const int64_t layer = op.integer("layer"), window = op.kind == "attend" ? op.integer("window") : 0;
    if (layer < 0) continue;
    int64_t& widest = windows.at(static_cast<size_t>(layer));
    widest = widest == 0 || window == 0 ? 0 : std::max(widest, window);
  }
  for (int64_t& w : windows) w = std::max<int64_t>(w, 0);
  return windows;
}

ProgramSpec read_program(const py::dict& d, KvType kv) {
  ProgramSpec p;
  p.kv = kv;
  p.symbols = field<std::vector<std::string>>(d, "symbols");
  for (const auto& code : d["sizes"]) p.sizes.push_back({code.cast<std::vector<int64_t>>()});
  for (const auto& item : d["slots"]) p.slots.push_back(read_slot(item));
  for (const auto& item : d["weights"]) {
    p.weights.push_back(
        {weight_type_named(field<std::string>(item, "type")), field<int64_t>(item, "n"), field<int64_t>(item, "k")});
  }
  for (const auto& item : d["ops"]) p.ops.push_back(read_op(item));
  for (const auto& item : d["caches"]) p.caches.push_back(read_cache(item, kv));
  p.windows = windows_of(p);
  p.inputs = field<std::vector<int>>(d, "inputs");
  p.outputs = field<std::vector<int>>(d, "outputs");
  p.logits_to_keep = field<int>(d, "logits_to_keep");
  p.row_local = field<bool>(d, "row_local");
  p.batch_symbol = field<int>(d, "batch");
  p.sequence_symbol = field<int>(d, "sequence");
  p.kept_symbol = field<int>(d, "kept");
  p.past_symbol = field<int>(d, "past");
  return p;
}

}  // namespace

std::shared_ptr<PyEngine> make_engine(const py::dict& program, int threads, const std::string& isa,
                                      const std::string& kv, int64_t context, int64_t prefill_rows) {
  if (threads < 1 || threads > 1024) raise("InputError", text("threads is ", threads, ", expected 1 to 1024"));
  if (context < 1 || context > INT32_MAX)
    raise("InputError", text("context is ", context, " tokens, expected 1 or more"));
  if (prefill_rows < 1) raise("InputError", text("prefill_rows is ", prefill_rows, ", expected 1 or more"));
  if (kv != "int8" && kv != "float32") raise("InputError", "kv is '" + kv + "', expected 'int8' or 'float32'");
  Kernels kernels{};
  try {
    kernels = kernels_for(isa);
  } catch (const std::invalid_argument& e) {
    raise("EngineUnavailable", e.what());
  }
  try {
    ProgramSpec spec = read_program(program, kv == "int8" ? KvType::int8 : KvType::float32);
    return std::make_shared<PyEngine>(std::move(spec), kernels, threads, context, prefill_rows);
  } catch (const UnknownName& e) {
    raise("EngineUnavailable", e.what());
  }
}

namespace {

// Some rows of one weight, checked: packing.WeightRows of edgeformer/engines/native/program/packing.py.
struct WeightRows {
  int weight = -1;
  std::string name;       // for messages
  PackSource source{};    // its `min` as the file has it: of weights less 8
  int64_t first_row = 0;  // packed row of source row 0, among those of its role
  PackRole role = PackRole::all;
  std::vector<std::pair<const void*, size_t>> mapped;

  int64_t packed_row(int64_t i) const {
    const int64_t row = first_row + i;
    if (role == PackRole::all) return row;
    return row / kLanes * 2 * kLanes + row % kLanes + (role == PackRole::up ? kLanes : 0);
  }
};

[[noreturn]] void refuse(const WeightRows& r, const std::string& what) {
  raise("InputError", "weight " + r.name + ": " + what);
}

const void* values(const WeightRows& r, const WeightSpec& w, const py::array& q) {
  const bool nibbles = has_nibbles(w.type);
  const int64_t size = nibbles ? (r.source.n * w.k + 1) / 2 : r.source.n * w.k;
  const char kind = nibbles ? 'u' : w.type == WeightType::f32 ? 'f' : 'i';
  if (q.dtype().kind() != kind || q.itemsize() != (kind == 'f' ? 4 : 1) || q.size() != size ||
      !(q.flags() & py::array::c_style)) {
    refuse(r, text(q.size(), " values of kind ", q.dtype().kind(), ", expected ", size, " contiguous ones of kind ",
                   kind));
  }
  return q.data();
}

const float* block_numbers(const WeightRows& r, const WeightSpec& w, const py::array& a) {
  const int64_t count = r.source.n * ((w.k + r.source.block - 1) / r.source.block);
  if (a.dtype().kind() != 'f' || a.itemsize() != 4 || a.size() != count || !(a.flags() & py::array::c_style)) {
    refuse(r, text(a.size(), " scales or minima, expected ", count, " float32"));
  }
  return static_cast<const float*>(a.data());
}

// q: uint8 (int4 nibbles), int8 or float32; all C-contiguous.
WeightRows read_rows(const ProgramSpec& spec, const py::object& o) {
  WeightRows r;
  r.weight = o.attr("weight").cast<int>();
  r.name = o.attr("name").cast<std::string>();
  r.first_row = o.attr("first_row").cast<int64_t>();
  r.role = value_named(kPackRoles, "role", o.attr("role").cast<std::string>());
  if (r.weight < 0 || r.weight >= static_cast<int>(spec.weights.size()))
    refuse(r, text("there is no number ", r.weight));
  const WeightSpec& w = spec.weights[r.weight];
  r.source.n = o.attr("rows").cast<int64_t>();
  r.source.k = w.k;
  r.source.block = o.attr("block").cast<int64_t>();
  if (r.source.n < 1 || r.first_row < 0 || r.packed_row(r.source.n - 1) >= round_up(w.n, kLanes)) {
    refuse(r, text("rows ", r.first_row, " to ", r.first_row + r.source.n, ", the packed weight has ", w.n));
  }
  r.source.q = values(r, w, o.attr("q").cast<py::array>());
  const int64_t span = span_of(w.type), least = w.type == WeightType::q8x16 ? 16 : span, block = r.source.block;
  if (block < least || block % least || (least == 16 && block != 16)) refuse(r, text("block of ", block));
  if (span > kBlock && w.k % span) refuse(r, text(w.k, " columns, expected a multiple of ", span));
  if (w.type != WeightType::f32) r.source.scale = block_numbers(r, w, o.attr("scale").cast<py::array>());
  if (w.type == WeightType::q4a) r.source.min = block_numbers(r, w, o.attr("min").cast<py::array>());
  for (const auto& item : o.attr("mapped")) {
    const auto a = item.cast<py::array>();
    r.mapped.emplace_back(a.data(), static_cast<size_t>(a.nbytes()));
  }
  return r;
}

PackResult pack_rows_of(Engine& engine, const WeightRows& r) {
  PackSource source = r.source;
  std::vector<float> minima;
  if (source.min) {
    minima.resize(static_cast<size_t>(source.n * ((source.k + source.block - 1) / source.block)));
    for (size_t i = 0; i < minima.size(); ++i) minima[i] = source.min[i] - 8.0f * source.scale[i];
    source.min = minima.data();
  }
  std::vector<int64_t> dest(static_cast<size_t>(source.n));
  for (int64_t i = 0; i < source.n; ++i) dest[i] = r.packed_row(i);
  const PackResult result = engine.pack(r.weight, source, dest.data());
  for (const auto& [data, bytes] : r.mapped) release_pages(data, bytes);
  return result;
}

}  // namespace

// For each item: whether a scale or a minimum had to be rounded. The GIL is free while weights are packed.
std::vector<bool> pack(PyEngine& self, const std::vector<py::object>& items) {
  if (self.packed)
    raise("InputError", "this engine uses packed weights that belong to another one; it cannot write them");
  std::vector<WeightRows> parts;
  for (const py::object& item : items) parts.push_back(read_rows(self.engine.spec(), item));
  std::vector<PackResult> results(parts.size());
  {
    py::gil_scoped_release release;
    // The large ones first, so that the threads end together.
    std::vector<size_t> order(parts.size());
    std::iota(order.begin(), order.end(), size_t(0));
    const auto size = [&parts](size_t i) { return parts[i].source.n * parts[i].source.k; };
    std::stable_sort(order.begin(), order.end(), [&size](size_t a, size_t b) { return size(a) > size(b); });
    auto work = [&](int64_t i) { results[order[i]] = pack_rows_of(self.engine, parts[order[i]]); };
    self.engine.in_parallel(static_cast<int64_t>(parts.size()), work);
  }
  std::vector<bool> rounded;
  for (size_t i = 0; i < parts.size(); ++i) {
    rounded.push_back(results[i].rounded);
    if (results[i].error == PackError::none) continue;
    const char* what = results[i].error == PackError::scale_beyond_fp16
                           ? "a scale is not a number or at least 65520, which float16 cannot hold"
                       : results[i].error == PackError::min_beyond_fp16
                           ? "a block minimum is not a number or at least 65520, which float16 cannot hold"
                           : "an int8 weight is -128; the native engine expects -127 to 127";
    raise("EngineUnavailable", "weight " + parts[i].name + ": " + what);
  }
  return rounded;
}

namespace {

// The bytes that `packed` of another engine of the same program returned, uint8[packed_size].
const uint8_t* checked_packed(const PyEngine& self, const py::array& bytes) {
  const auto* at = static_cast<const uint8_t*>(bytes.data());
  const size_t size = self.engine.packed_size();
  if (bytes.itemsize() != 1 || static_cast<size_t>(bytes.nbytes()) != size || !(bytes.flags() & py::array::c_style) ||
      reinterpret_cast<uintptr_t>(at) % 64) {
    raise("InputError", text(bytes.nbytes(), " packed bytes at ", static_cast<const void*>(at), ", expected ", size,
                             " contiguous ones at a multiple of 64"));
  }
  if (self.engine.packed()) raise("InputError", "this engine has its weights already");
  return at;
}

}  // namespace

// The bytes are not copied: the engine reads them as long as it lives.
void use_packed(PyEngine& self, const py::array& bytes) {
  self.engine.use_packed(checked_packed(self, bytes));
  self.packed = bytes;
}

// The bytes are copied, into huge pages where the system has them, by all threads; the GIL is free meanwhile.
void copy_packed(PyEngine& self, const py::array& bytes, bool mapped) {
  const uint8_t* from = checked_packed(self, bytes);
  py::gil_scoped_release release;
  self.engine.copy_packed(from, mapped);
}

}  // namespace edgeformer
