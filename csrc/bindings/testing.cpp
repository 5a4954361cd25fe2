// edgeformer._native.testing: every kernel and the packing, callable from Python for tests.
//
// Buffers are numpy arrays whose sizes are checked here. Nothing of this is used by the engine.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"
#include "engine/dispatch.h"
#include "kernels/pack.h"
#include "program/kv_cache.h"

namespace edgeformer {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Floats = Array<float>;
using Bytes = Array<uint8_t>;

template <class T>
void expect(const Array<T>& a, int64_t size, const char* name) {
  if (a.size() < size)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(a.size()) + " elements, expected " +
                                std::to_string(size));
}

using Given = std::optional<Floats>;  // None: null
const float* data_of(const Given& a, int64_t size, const char* name) {
  if (a) expect(*a, size, name);
  return a ? a->data() : nullptr;
}

Unary unary_named(const std::string& name) { return value_named(kUnaryTable, "function", name); }

// Packed weights in the engine's own memory.
struct Packed {
  WeightType type;
  int64_t n, k;
  size_t bytes;
  void* data;

  Packed(const std::string& name, int64_t rows, int64_t columns)
      : type(weight_type_named(name)), n(rows), k(columns), bytes(packed_bytes(type, n, k)), data(pages_alloc(bytes)) {
    if (!data) throw std::bad_alloc();
  }
  ~Packed() { pages_free(data, bytes); }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  // Rows of a source; dest maps them to packed rows.
  bool pack(const py::array& q, const py::object& scale, const py::object& min, int64_t block, const py::object& dest) {
    PackSource source = {};
    const auto floats = [](const py::object& o) { return o.is_none() ? Floats() : o.cast<Floats>(); };
    const Floats s = floats(scale), m = floats(min);
    const Array<int64_t> rows = dest.is_none() ? Array<int64_t>() : dest.cast<Array<int64_t>>();
    source.n = dest.is_none() ? n : int64_t(rows.size());
    source.k = k;
    source.block = block;
    source.q = q.data();
    const bool nibbles = has_nibbles(type);
    const int64_t elements = source.n * k, size = type == WeightType::f32 ? 4 * elements : elements;
    if (int64_t(q.nbytes()) != (nibbles ? (elements + 1) / 2 : size)) throw std::invalid_argument("q: wrong size");
    if (type != WeightType::f32) {
      const int64_t scales = source.n * ((k + block - 1) / block);
      expect(s, scales, "scale");
      source.scale = s.data();
      if (type == WeightType::q4a) expect(m, scales, "min"), source.min = m.data();
    }
    for (int64_t r = 0; r < int64_t(rows.size()); r++)
      if (rows.data()[r] < 0 || rows.data()[r] >= n) throw std::invalid_argument("dest: row out of range");
    const auto [error, rounded] = pack_rows(type, source, 0, source.n, rows.size() ? rows.data() : nullptr, data);
    if (error == PackError::scale_beyond_fp16) throw std::invalid_argument("a scale is beyond fp16");
    if (error == PackError::min_beyond_fp16) throw std::invalid_argument("a minimum is beyond fp16");
    if (error == PackError::weight_below_minus_127) throw std::invalid_argument("a weight is -128");
    return rounded;
  }
  Floats row(int64_t r) const {
    if (r < 0 || r >= n) throw std::invalid_argument("row out of range");
    Floats y(k);
    unpack_row(type, data, k, r, y.mutable_data());
    return y;
  }
  py::bytes raw() const { return {static_cast<const char*>(data), bytes}; }
};

struct Quantized {
  int64_t m, k;
  Array<int8_t> q;
  Bytes blocks;  // XBlock records
  XBlock* xb() { return reinterpret_cast<XBlock*>(blocks.mutable_data()); }
};

// The rotation of Table::rope.
struct Rope {
  int64_t heads, head_dim, rotary;
  bool interleaved;
};

// The queries of Table::attention; the fields are those of AttentionArgs in kernels.h.
struct Queries {
  Floats q;                   // [tokens, heads * head_dim]
  Array<int32_t> begin, end;  // [tokens]
  int64_t group = 1;
  float scale = 1.0f, softcap = 0.0f;
  std::optional<Floats> mask;
  int64_t mask_token = 0, mask_head = 0;
};

class Table {
 public:
  explicit Table(const std::string& isa) : k_(kernels_for(isa)) {}
  const char* isa() const { return k_.isa; }
  std::pair<int64_t, int64_t> prefetch() const { return {k_.prefetch[0], k_.prefetch[1]}; }
  void set_prefetch(std::pair<int64_t, int64_t> bytes) { k_.prefetch[0] = bytes.first, k_.prefetch[1] = bytes.second; }

  Quantized quantize(const Floats& x, int64_t columns, int64_t span) {
    const int64_t m = x.shape(0), ldx = x.shape(1);
    if (columns > ldx) throw std::invalid_argument("more columns than x has");
    if (span != kBlock && span != 64 && span != 128) throw std::invalid_argument("span is 32, 64 or 128");
    if (span > kBlock && columns % span) throw std::invalid_argument("columns is no multiple of the span");
    Quantized out = {m, columns, Array<int8_t>(m * blocks_of(columns) * kBlock),
                     Bytes(m * blocks_of(columns) * int64_t(sizeof(XBlock)))};
    k_.quantize({.x = x.data(),
                 .ldx = ldx,
                 .m = m,
                 .k = columns,
                 .span = span,
                 .block_begin = 0,
                 .block_end = blocks_of(columns),
                 .xq = out.q.mutable_data(),
                 .xb = out.xb()});
    return out;
  }
  // y: [m, ldy], written from its first column on.
  void linear(const Packed& w, Quantized& x, Floats& y, int64_t panel_begin, int64_t panel_end) {
    LinearArgs a = linear_args(w, x.m, y, panel_begin, panel_end);
    if (w.type == WeightType::f32 || x.k != w.k) throw std::invalid_argument("x is not for this weight");
    a.xq = x.q.data();
    a.xb = x.xb();
    k_.linear[int(w.type)](a, panel_begin, panel_end);
  }
  void linear_f32(const Packed& w, const Floats& x, Floats& y, int64_t panel_begin, int64_t panel_end) {
    LinearArgs a = linear_args(w, x.shape(0), y, panel_begin, panel_end);
    if (w.type != WeightType::f32 || x.shape(1) < w.k) throw std::invalid_argument("x is not for this weight");
    a.x = x.data();
    a.ldx = x.shape(1);
    k_.linear[int(w.type)](a, panel_begin, panel_end);
  }
  // Seconds of `repeats` linears over all panels of each of `weights` in turn, on a pool.
  double time_linear(const std::vector<Packed*>& weights, Quantized& x, int threads, int64_t chunk_panels,
                     int repeats) {
    ThreadPool pool(threads);
    std::vector<Floats> y;
    for (const Packed* w : weights) y.emplace_back(std::vector<py::ssize_t>{x.m, panels_of(w->n) * kLanes});
    const auto chunks = [&](int p) { return (panels_of(weights[size_t(p)]->n) + chunk_panels - 1) / chunk_panels; };
    auto begin = [&](int p) -> int64_t { return chunks(p % int(weights.size())); };
    auto work = [&](int p, int64_t c, int) {
      const size_t i = size_t(p) % weights.size();
      const Packed& w = *weights[i];
      LinearArgs a = {};
      const int64_t first = c * chunk_panels, end = first + chunk_panels;
      a.w = w.data, a.n = w.n, a.k = w.k, a.m = x.m, a.prefetch = k_.prefetch_for(x.m), a.xq = x.q.data(),
      a.xb = x.xb();
      a.ldy = panels_of(w.n) * kLanes;
      a.y = const_cast<float*>(y[i].data()) + first * kLanes;
      k_.linear[int(w.type)](a, first, end < panels_of(w.n) ? end : panels_of(w.n));
    };
    py::gil_scoped_release unlocked;
    pool.run(int(weights.size()), begin, work);
    const auto start = std::chrono::steady_clock::now();
    pool.run(int(weights.size()) * repeats, begin, work);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void unary(const std::string& op, const Floats& x, Floats& y) {
    expect(y, x.size(), "y");
    k_.unary(unary_named(op), x.data(), y.mutable_data(), x.size());
  }
  void epilogue(Floats& y, int64_t columns, const Given& bias, const std::string& op, float scale,
                const Given& residual) {
    EpilogueArgs a = {};
    a.y = y.mutable_data(), a.ldy = y.shape(1), a.m = y.shape(0), a.columns = columns;
    a.activation = unary_named(op), a.scale = scale, a.bias = data_of(bias, columns, "bias");
    if (residual) {
      if (residual->shape(0) != a.m || residual->shape(1) < columns)
        throw std::invalid_argument("residual: wrong shape");
      a.residual = residual->data(), a.ldr = residual->shape(1);
    }
    k_.epilogue(a);
  }
  void gated(const Floats& y, int64_t columns, const Given& bias, const std::string& op, Floats& out) {
    GatedArgs a = {};
    a.y = y.data(), a.ldy = y.shape(1), a.m = y.shape(0), a.columns = columns, a.activation = unary_named(op);
    a.out = out.mutable_data(), a.ldo = out.shape(1), a.bias = data_of(bias, 2 * round_up(columns, kLanes), "bias");
    if (a.ldy < 2 * round_up(columns, kLanes) || a.ldo < columns) throw std::invalid_argument("gated: wrong shape");
    k_.gated(a);
  }
  void rms_norm(const Floats& x, int64_t n, const Given& weight, float eps, Floats& y) {
    NormArgs a = norm_args(x, n, eps, y);
    a.weight = data_of(weight, n, "weight");
    k_.rms_norm(a);
  }
  void layer_norm(const Floats& x, int64_t n, const Given& weight, const Given& bias, float eps, Floats& y) {
    NormArgs a = norm_args(x, n, eps, y);
    a.weight = data_of(weight, n, "weight");
    a.bias = data_of(bias, n, "bias");
    k_.layer_norm(a);
  }
  void softmax(const Floats& x, int64_t n, Floats& y) {
    k_.softmax(x.data(), x.shape(1), x.shape(0), n, y.mutable_data(), y.shape(1));
  }
  py::tuple exponential_sums(const Floats& x, float top) {
    py::array_t<double> sums((x.size() + kSumBlock - 1) / kSumBlock);
    const double products = k_.exponential_sums(x.data(), x.size(), top, sums.mutable_data());
    return py::make_tuple(sums, products);
  }
  py::array_t<int64_t> places_reaching(const Floats& x, float bound) {
    std::vector<int64_t> places(size_t(x.size()));
    return py::array_t<int64_t>(k_.places_reaching(x.data(), x.size(), bound, places.data()), places.data());
  }
  int64_t place_of_largest(const Floats& x) {
    if (x.size() < 1) throw std::invalid_argument("place_of_largest: no numbers");
    return k_.place_of_largest(x.data(), x.size());
  }
  void rope(const Floats& x, const Rope& rope, const Floats& cos, const Floats& sin, Floats& y) {
    const int64_t m = x.shape(0), columns = rope.heads * rope.head_dim;
    if (x.shape(1) < columns || y.shape(0) < m || y.shape(1) < columns || rope.rotary > rope.head_dim)
      throw std::invalid_argument("rope: wrong shape");
    expect(cos, m * rope.rotary / 2, "cos");
    expect(sin, m * rope.rotary / 2, "sin");
    k_.rope({.x = x.data(),
             .ldx = x.shape(1),
             .m = m,
             .heads = rope.heads,
             .head_dim = rope.head_dim,
             .rotary = rope.rotary,
             .interleaved = rope.interleaved,
             .cos = cos.data(),
             .sin = sin.data(),
             .ldc = rope.rotary / 2,
             .y = y.mutable_data(),
             .ldy = y.shape(1)});
  }

  // k: [tokens, heads * head_dim], v: [tokens, heads * value_dim], appended to `layer` (no advance).
  void kv_append(KvCache& cache, int64_t layer, const Floats& k, const Floats& v) {
    KvAppendArgs a = {};
    a.layout = cache.layout(layer), a.chunks = cache.chunks(layer), a.position = cache.length(), a.tokens = k.shape(0);
    a.head_end = a.layout.kv_heads, a.k = k.data(), a.ldk = k.shape(1), a.v = v.data(), a.ldv = v.shape(1);
    if (a.ldk < a.layout.kv_heads * a.layout.head_dim || a.ldv < a.layout.kv_heads * a.layout.value_dim ||
        v.shape(0) != a.tokens)
      throw std::invalid_argument("kv_append: wrong shape");
    k_.kv_append(a);
  }
  // mode "rows": `attention` over tokens in steps of `step`; "chunks": partials of every chunk, then the merge.
  Floats attention(const KvCache& cache, int64_t layer, const Queries& given, const std::string& mode, int64_t step) {
    if (mode != "rows" && mode != "chunks") throw std::invalid_argument("mode is rows or chunks");
    AttentionArgs a = {};
    a.layout = cache.layout(layer), a.chunks = cache.chunks(layer), a.group = given.group;
    a.tokens = given.q.shape(0), a.q = given.q.data(), a.ldq = given.q.shape(1);
    a.begin = given.begin.data(), a.end = given.end.data(), a.scale = given.scale, a.softcap = given.softcap;
    a.mask = data_of(given.mask, 0, "mask"), a.mask_token = given.mask_token, a.mask_head = given.mask_head;
    expect(given.begin, a.tokens, "begin");
    expect(given.end, a.tokens, "end");
    a.ldo = a.layout.kv_heads * a.group * a.layout.value_dim;
    Floats out({a.tokens, a.ldo});
    a.out = out.mutable_data();
    int64_t chunks = 0;
    for (int64_t i = 0; i < a.tokens; i++) chunks = std::max<int64_t>(chunks, blocks(a.end[i]));
    for (int64_t h = 0; h < a.layout.kv_heads; h++) {
      for (int64_t t = 0; t < a.tokens; t += step) {
        const int64_t t_end = std::min(t + step, a.tokens);
        if (mode == "rows") {
          k_.attention(a, h, t, t_end);
          continue;
        }
        const int64_t stride = (t_end - t) * a.group * partial_floats(a.layout);
        std::vector<float> partial(size_t(std::max<int64_t>(chunks, 1) * stride), 1e30f);
        for (int64_t c = 0; c < chunks; c++) k_.attention_partial(a, h, t, t_end, c, partial.data() + c * stride);
        k_.attention_merge(a, h, t, t_end, {.partial = partial.data(), .chunks = chunks, .stride = stride});
      }
    }
    return out;
  }

 private:
  static int64_t blocks(int64_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }

  static NormArgs norm_args(const Floats& x, int64_t n, float eps, Floats& y) {
    if (x.shape(1) < n || y.shape(0) < x.shape(0) || y.shape(1) < n) throw std::invalid_argument("norm: wrong shape");
    NormArgs a = {};
    a.x = x.data(), a.ldx = x.shape(1), a.m = x.shape(0), a.n = n, a.eps = eps, a.y = y.mutable_data();
    a.ldy = y.shape(1);
    return a;
  }

  LinearArgs linear_args(const Packed& w, int64_t m, Floats& y, int64_t panel_begin, int64_t panel_end) {
    LinearArgs a = {};
    if (panel_begin < 0 || panel_end > panels_of(w.n) || panel_begin > panel_end)
      throw std::invalid_argument("panels out of range");
    const int64_t columns = std::min(w.n, panel_end * kLanes) - panel_begin * kLanes;
    if (y.shape(0) != m || y.shape(1) < columns) throw std::invalid_argument("y: wrong shape");
    a.w = w.data, a.n = w.n, a.k = w.k, a.m = m, a.y = y.mutable_data(), a.ldy = y.shape(1);
    a.prefetch = k_.prefetch_for(m);
    return a;
  }

  Kernels k_;
};

}  // namespace

void bind_testing(py::module_& parent) {
  py::module_ m = parent.def_submodule("testing", "Kernels, pool and KV cache for tests.");
  m.attr("CHUNK_TOKENS") = kChunkTokens;
  m.attr("WEIGHT_TYPES") =
      py::tuple(py::cast(std::vector<std::string>(kWeightTypeNames, kWeightTypeNames + kWeightTypes)));
  py::class_<Packed>(m, "Packed")
      .def(py::init<std::string, int64_t, int64_t>(), py::arg("type"), py::arg("n"), py::arg("k"))
      .def("pack", &Packed::pack, py::arg("q"), py::arg("scale") = py::none(), py::arg("min") = py::none(),
           py::arg("block") = 32, py::arg("dest") = py::none())
      .def("row", &Packed::row)
      .def("raw", &Packed::raw)
      .def_readonly("bytes", &Packed::bytes);
  py::class_<Quantized>(m, "Quantized").def_readonly("q", &Quantized::q).def_readonly("blocks", &Quantized::blocks);
  py::class_<Rope>(m, "Rope").def(py::init([](int64_t heads, int64_t head_dim, int64_t rotary, bool interleaved) {
                                    return Rope{heads, head_dim, rotary, interleaved};
                                  }),
                                  py::kw_only(), py::arg("heads"), py::arg("head_dim"), py::arg("rotary"),
                                  py::arg("interleaved"));
  py::class_<Queries>(m, "Queries")
      .def(py::init<>())
      .def_readwrite("q", &Queries::q)
      .def_readwrite("begin", &Queries::begin)
      .def_readwrite("end", &Queries::end)
      .def_readwrite("group", &Queries::group)
      .def_readwrite("scale", &Queries::scale)
      .def_readwrite("softcap", &Queries::softcap)
      .def_readwrite("mask", &Queries::mask)
      .def_readwrite("mask_token", &Queries::mask_token)
      .def_readwrite("mask_head", &Queries::mask_head);
  py::class_<Table>(m, "Table")
      .def(py::init<std::string>(), py::arg("isa") = "")
      .def_property_readonly("isa", &Table::isa)
      .def_property("prefetch", &Table::prefetch, &Table::set_prefetch)
      .def("quantize", &Table::quantize, py::arg("x"), py::arg("columns"), py::arg("span") = kBlock)
      .def("linear", &Table::linear)
      .def("linear_f32", &Table::linear_f32)
      .def("time_linear", &Table::time_linear)
      .def("unary", &Table::unary)
      .def("epilogue", &Table::epilogue)
      .def("gated", &Table::gated)
      .def("rms_norm", &Table::rms_norm)
      .def("layer_norm", &Table::layer_norm)
      .def("softmax", &Table::softmax)
      .def("exponential_sums", &Table::exponential_sums)
      .def("places_reaching", &Table::places_reaching)
      .def("place_of_largest", &Table::place_of_largest)
      .def("rope", &Table::rope)
      .def("kv_append", &Table::kv_append)
      .def("attention", &Table::attention, py::arg("cache"), py::arg("layer"), py::arg("queries"),
           py::arg("mode") = "rows", py::arg("step") = 1 << 20);
  bind_kv_cache(m);
  bind_pool(m);
}

}  // namespace edgeformer
