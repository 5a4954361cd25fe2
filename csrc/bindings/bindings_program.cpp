// From Python's description of a program to an engine, and from a model file's arrays to packed weights.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "bindings/bindings.h"
#include "engine/dispatch.h"

namespace edgeformer {
namespace {

ProgramSpec read_program(const py::dict& d, KvType kv) {
  ProgramSpec p;
  p.kv = kv;
  p.symbols = d["symbols"].cast<std::vector<std::string>>();
  for (const auto& code : d["sizes"]) p.sizes.push_back({code.cast<std::vector<int64_t>>()});
  for (const auto& item : d["slots"]) {
    const auto t = item.cast<py::sequence>();
    SlotSpec s;
    s.name = t[0].cast<std::string>();
    s.dtype = static_cast<DType>(t[1].cast<int>());
    s.shape = t[2].cast<std::vector<int>>();
    s.view_of = t[3].cast<int>();
    if (s.shape.size() > kMaxRank) {
      raise("EngineUnavailable",
            text(s.name, " has rank ", s.shape.size(), ", the native engine knows up to ", kMaxRank));
    }
    if (!t[4].is_none()) {
      const auto bytes = t[4].cast<py::buffer>().request();
      const auto* data = static_cast<const uint8_t*>(bytes.ptr);
      s.constant.assign(data, data + bytes.size * bytes.itemsize);
      s.is_constant = true;
    }
    p.slots.push_back(std::move(s));
  }
  for (const auto& item : d["weights"]) {
    const auto t = item.cast<py::sequence>();
    p.weights.push_back({static_cast<WeightType>(t[0].cast<int>()), t[1].cast<int64_t>(), t[2].cast<int64_t>()});
  }
  for (const auto& item : d["ops"]) {
    const auto t = item.cast<py::sequence>();
    OpSpec op;
    op.kind = t[0].cast<std::string>();
    op.inputs = t[1].cast<std::vector<int>>();
    op.outputs = t[2].cast<std::vector<int>>();
    op.weights = t[3].cast<std::vector<int>>();
    op.ints = t[4].cast<std::map<std::string, std::vector<int64_t>>>();
    op.floats = t[5].cast<std::map<std::string, std::vector<double>>>();
    op.sizes = t[6].cast<std::map<std::string, std::vector<int>>>();
    p.ops.push_back(std::move(op));
  }
  for (const auto& item : d["caches"]) {
    const auto t = item.cast<py::sequence>();
    const KvType type = t[3].cast<bool>() ? KvType::float32 : kv;
    p.caches.push_back({type, t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>()});
    const KvLayout& l = p.caches.back();
    if (l.head_dim > kMaxHeadDim || l.value_dim > kMaxHeadDim) {
      raise("EngineUnavailable", text("attention heads of ", std::max(l.head_dim, l.value_dim),
                                      " columns; the native engine knows up to ", kMaxHeadDim));
    }
  }
  p.inputs = d["inputs"].cast<std::vector<int>>();
  p.outputs = d["outputs"].cast<std::vector<int>>();
  p.row_local = d["row_local"].cast<bool>();
  p.batch_symbol = d["batch"].cast<int>();
  p.sequence_symbol = d["sequence"].cast<int>();
  p.kept_symbol = d["kept"].cast<int>();
  p.past_symbol = d["past"].cast<int>();
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
  ProgramSpec spec = read_program(program, kv == "int8" ? KvType::int8 : KvType::float32);
  return std::make_shared<PyEngine>(std::move(spec), kernels, threads, context, prefill_rows);
}

namespace {

// Gives the whole pages among these bytes of a mapped file back; a later reader gets them from the file again.
void release_pages([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + page - 1) / page * page, end = (start + bytes) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
#endif
}

// One piece of a weight, checked: what edgeformer/engines/native/program/packing.py calls a Piece.
struct Piece {
  int weight;
  std::string name;
  PackSource source;  // its `min` as the file has it: of weights less 8
  int64_t first;      // packed row of source row 0
  int half;           // packing.HALVES: all rows in order, or panels of gate (1) and up (2) in turn
  std::vector<std::pair<const void*, size_t>> mapped;
};

// q: uint8 (int4 nibbles), int8 or float32; all C-contiguous.
Piece read_piece(const ProgramSpec& spec, const py::tuple& t) {
  Piece p{t[0].cast<int>(), t[1].cast<std::string>(), {}, t[7].cast<int64_t>(), t[8].cast<int>(), {}};
  const auto refuse = [&p](const std::string& what) { raise("InputError", "weight " + p.name + ": " + what); };
  if (p.weight < 0 || p.weight >= static_cast<int>(spec.weights.size())) refuse(text("there is no number ", p.weight));
  const WeightSpec& w = spec.weights[p.weight];
  const auto q = t[2].cast<py::array>();
  const int64_t rows = t[5].cast<int64_t>(), block = t[6].cast<int64_t>();
  const bool nibbles = has_nibbles(w.type);
  const int64_t size = nibbles ? (rows * w.k + 1) / 2 : rows * w.k;
  const char kind = nibbles ? 'u' : w.type == WeightType::f32 ? 'f' : 'i';
  if (q.dtype().kind() != kind || q.itemsize() != (kind == 'f' ? 4 : 1) || q.size() != size ||
      !(q.flags() & py::array::c_style)) {
    refuse(
        text(q.size(), " values of kind ", q.dtype().kind(), ", expected ", size, " contiguous ones of kind ", kind));
  }
  const int64_t span = span_of(w.type), least = w.type == WeightType::q8x16 ? 16 : span;
  if (block < least || block % least || (least == 16 && block != 16)) refuse(text("block of ", block));
  if (span > kBlock && w.k % span) refuse(text(w.k, " columns, expected a multiple of ", span));
  p.source = {q.data(), nullptr, nullptr, rows, w.k, block};
  const int64_t scales = w.type == WeightType::f32 ? 0 : rows * ((w.k + block - 1) / block);
  const auto floats = [&](const py::object& o) -> const float* {
    const auto a = o.cast<py::array>();
    if (a.dtype().kind() != 'f' || a.itemsize() != 4 || a.size() != scales || !(a.flags() & py::array::c_style))
      refuse(text(a.size(), " scales or minima, expected ", scales, " float32"));
    return static_cast<const float*>(a.data());
  };
  if (w.type != WeightType::f32) p.source.scale = floats(t[3]);
  if (w.type == WeightType::q4a) p.source.min = floats(t[4]);
  const int64_t last = p.half ? (p.first + rows - 1) / kLanes * 2 * kLanes + kLanes * p.half - 1 : p.first + rows - 1;
  if (rows < 1 || p.first < 0 || p.half < 0 || p.half > 2 || last >= round_up(w.n, kLanes))
    refuse(text("rows ", p.first, " to ", p.first + rows, " of half ", p.half, " of ", w.n));
  for (const auto& item : t[9].cast<py::sequence>()) {
    const auto a = item.cast<py::array>();
    p.mapped.emplace_back(a.data(), static_cast<size_t>(a.nbytes()));
  }
  return p;
}

PackResult pack_piece(Engine& engine, const Piece& p) {
  PackSource source = p.source;
  std::vector<float> minima;
  if (source.min) {
    minima.resize(static_cast<size_t>(source.n * ((source.k + source.block - 1) / source.block)));
    for (size_t i = 0; i < minima.size(); ++i) minima[i] = source.min[i] - 8.0f * source.scale[i];
    source.min = minima.data();
  }
  std::vector<int64_t> dest(static_cast<size_t>(source.n));
  for (int64_t i = 0; i < source.n; ++i) {
    const int64_t row = p.first + i;
    dest[i] = p.half ? row / kLanes * 2 * kLanes + row % kLanes + kLanes * (p.half - 1) : row;
  }
  const PackResult result = engine.pack(p.weight, source, dest.data());
  for (const auto& [data, bytes] : p.mapped) release_pages(data, bytes);
  return result;
}

}  // namespace

// For each piece whether a scale or a minimum had to be rounded. The GIL is free all the while.
std::vector<bool> pack(PyEngine& self, const std::vector<py::tuple>& items) {
  if (self.packed) raise("InputError", "this engine was given packed weights, which are another's to write");
  std::vector<Piece> pieces;
  for (const py::tuple& item : items) pieces.push_back(read_piece(self.engine.spec(), item));
  std::vector<PackResult> results(pieces.size());
  {
    py::gil_scoped_release release;
    // The large ones first, so that the threads end together.
    std::vector<size_t> order(pieces.size());
    std::iota(order.begin(), order.end(), size_t(0));
    const auto size = [&pieces](size_t i) { return pieces[i].source.n * pieces[i].source.k; };
    std::stable_sort(order.begin(), order.end(), [&size](size_t a, size_t b) { return size(a) > size(b); });
    auto work = [&](int64_t i) { results[order[i]] = pack_piece(self.engine, pieces[order[i]]); };
    self.engine.in_parallel(static_cast<int64_t>(pieces.size()), work);
  }
  std::vector<bool> rounded;
  for (size_t i = 0; i < pieces.size(); ++i) {
    rounded.push_back(results[i].rounded);
    if (results[i].error == PackError::none) continue;
    const char* what = results[i].error == PackError::scale_beyond_fp16
                           ? "a scale is no number or at least 65520, which float16 cannot hold"
                       : results[i].error == PackError::min_beyond_fp16
                           ? "a block minimum is no number or at least 65520, which float16 cannot hold"
                           : "an int8 weight is -128; the native engine expects -127 to 127";
    raise("EngineUnavailable", "weight " + pieces[i].name + ": " + what);
  }
  return rounded;
}

// What `packed` of another engine of the same program gave, uint8[packed_size]; the engine reads it where it lies.
void use_packed(PyEngine& self, const py::array& bytes) {
  const auto* at = static_cast<const uint8_t*>(bytes.data());
  const size_t size = self.engine.packed_size();
  if (bytes.itemsize() != 1 || static_cast<size_t>(bytes.nbytes()) != size || !(bytes.flags() & py::array::c_style) ||
      reinterpret_cast<uintptr_t>(at) % 64) {
    raise("InputError", text(bytes.nbytes(), " packed bytes at ", static_cast<const void*>(at), ", expected ", size,
                             " contiguous ones at a multiple of 64"));
  }
  if (self.engine.packed()) raise("InputError", "this engine has its weights already");
  self.engine.use_packed(at);
  self.packed = bytes;
}

}  // namespace edgeformer
