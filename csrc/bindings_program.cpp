// From Python's description of a program to an engine, and from a model file's arrays to packed weights.
#include <algorithm>
#include <stdexcept>

#include "bindings.h"
#include "dispatch.h"

namespace edgeformer {
namespace {

ProgramSpec read_program(const py::dict& d, KvType kv) {
  ProgramSpec p;
  p.kv = kv;
  p.symbols = d["symbols"].cast<std::vector<std::string>>();
  for (const auto& code : d["sizes"]) p.sizes.push_back({code.cast<std::vector<int64_t>>()});
  for (const auto& item : d["slots"]) {
    const auto t = item.cast<py::tuple>();
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
    const auto t = item.cast<py::tuple>();
    p.weights.push_back({static_cast<WeightType>(t[0].cast<int>()), t[1].cast<int64_t>(), t[2].cast<int64_t>()});
  }
  for (const auto& item : d["ops"]) {
    const auto t = item.cast<py::tuple>();
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
    const auto t = item.cast<py::tuple>();
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

// q: uint8 (int4 nibbles), int8 or float32; all C-contiguous. True where a scale or minimum had to be rounded.
bool pack(PyEngine& self, int weight, const py::array& q, const py::object& scale, const py::object& minimum,
          int64_t rows, int64_t block, const py::array_t<int64_t, py::array::c_style>& dest) {
  const ProgramSpec& spec = self.engine.spec();
  if (weight < 0 || weight >= static_cast<int>(spec.weights.size())) raise("InputError", text("no weight ", weight));
  const WeightSpec& w = spec.weights[weight];
  const bool nibbles = w.type == WeightType::q4 || w.type == WeightType::q4a;
  const int64_t size = nibbles ? (rows * w.k + 1) / 2 : rows * w.k;
  const char kind = nibbles ? 'u' : w.type == WeightType::f32 ? 'f' : 'i';
  if (q.dtype().kind() != kind || q.itemsize() != (kind == 'f' ? 4 : 1) || q.size() != size ||
      !(q.flags() & py::array::c_style)) {
    raise("InputError", text("weight ", weight, ": ", q.size(), " values of kind ", q.dtype().kind(), ", expected ",
                             size, " contiguous ones of kind ", kind));
  }
  const bool small_block = w.type == WeightType::q8x16;
  if (small_block ? block != 16 : block < 32 || block % 32) raise("InputError", text("block of ", block));
  PackSource s{q.data(), nullptr, nullptr, rows, w.k, block};
  const int64_t scales = rows * ((w.k + block - 1) / block);
  const auto floats = [&](const py::object& o) -> const float* {
    const auto a = o.cast<py::array>();
    if (a.dtype().kind() != 'f' || a.itemsize() != 4 || a.size() != scales || !(a.flags() & py::array::c_style)) {
      raise("InputError", text("weight ", weight, ": ", a.size(), " scales or minima, expected ", scales, " float32"));
    }
    return static_cast<const float*>(a.data());
  };
  if (w.type != WeightType::f32) s.scale = floats(scale);
  if (w.type == WeightType::q4a) s.min = floats(minimum);
  if (dest.size() != rows) raise("InputError", text("dest has ", dest.size(), " rows, expected ", rows));
  for (int64_t i = 0; i < rows; ++i) {
    if (dest.data()[i] < 0 || dest.data()[i] >= round_up(w.n, kLanes)) raise("InputError", "dest row out of range");
  }
  PackResult result;
  {
    py::gil_scoped_release release;
    result = self.engine.pack(weight, s, dest.data());
  }
  switch (result.error) {
    case PackError::none:
      break;
    case PackError::scale_beyond_fp16:
      raise("EngineUnavailable", "a scale is no number or at least 65520, which float16 cannot hold");
    case PackError::min_beyond_fp16:
      raise("EngineUnavailable", "a block minimum is no number or at least 65520, which float16 cannot hold");
    case PackError::weight_below_minus_127:
      raise("EngineUnavailable", "an int8 weight is -128; the native engine expects -127 to 127");
  }
  return result.rounded;
}

}  // namespace edgeformer
