// edgeformer._native.testing: every kernel, the packing and the KV cache, callable from Python for tests.
//
// Buffers are numpy arrays whose sizes are checked here. Nothing of this is used by the engine.
#include <algorithm>
#include <chrono>
#include <cstring>
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

KvLayout layout_of(const std::string& type, int64_t heads, int64_t head_dim, int64_t value_dim) {
  if (type != "int8" && type != "float32") throw std::invalid_argument("kv type is int8 or float32");
  if (head_dim > kMaxHeadDim || value_dim > kMaxHeadDim) throw std::invalid_argument("head_dim too large");
  return {type == "int8" ? KvType::int8 : KvType::float32, heads, head_dim, value_dim};
}

// One call of attention on one layer of a cache.
struct Attention {
  AttentionArgs args = {};
  Floats q, mask, out;
  Array<int32_t> begin, end;
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
    k_.quantize(x.data(), ldx, m, columns, span, 0, blocks_of(columns), out.q.mutable_data(), out.xb());
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
  void epilogue(Floats& y, int64_t columns, const py::object& bias, const std::string& op, float scale,
                const py::object& residual) {
    EpilogueArgs a = {};
    a.y = y.mutable_data(), a.ldy = y.shape(1), a.m = y.shape(0), a.columns = columns;
    a.activation = unary_named(op), a.scale = scale;
    Floats b, r;
    if (!bias.is_none()) b = bias.cast<Floats>(), expect(b, columns, "bias"), a.bias = b.data();
    if (!residual.is_none()) {
      r = residual.cast<Floats>();
      if (r.shape(0) != a.m || r.shape(1) < columns) throw std::invalid_argument("residual: wrong shape");
      a.residual = r.data(), a.ldr = r.shape(1);
    }
    k_.epilogue(a);
  }
  void gated(const Floats& y, int64_t columns, const py::object& bias, const std::string& op, Floats& out) {
    GatedArgs a = {};
    a.y = y.data(), a.ldy = y.shape(1), a.m = y.shape(0), a.columns = columns, a.activation = unary_named(op);
    a.out = out.mutable_data(), a.ldo = out.shape(1);
    Floats b;
    if (!bias.is_none()) {
      b = bias.cast<Floats>();
      expect(b, 2 * round_up(columns, kLanes), "bias");
      a.bias = b.data();
    }
    if (a.ldy < 2 * round_up(columns, kLanes) || a.ldo < columns) throw std::invalid_argument("gated: wrong shape");
    k_.gated(a);
  }
  void rms_norm(const Floats& x, int64_t n, const py::object& weight, float eps, Floats& y) {
    Floats w;
    if (!weight.is_none()) w = weight.cast<Floats>(), expect(w, n, "weight");
    expect(y, x.shape(0) * y.shape(1), "y");
    k_.rms_norm(x.data(), x.shape(1), x.shape(0), n, weight.is_none() ? nullptr : w.data(), eps, y.mutable_data(),
                y.shape(1));
  }
  void layer_norm(const Floats& x, int64_t n, const py::object& weight, const py::object& bias, float eps, Floats& y) {
    Floats w, b;
    if (!weight.is_none()) w = weight.cast<Floats>(), expect(w, n, "weight");
    if (!bias.is_none()) b = bias.cast<Floats>(), expect(b, n, "bias");
    k_.layer_norm(x.data(), x.shape(1), x.shape(0), n, weight.is_none() ? nullptr : w.data(),
                  bias.is_none() ? nullptr : b.data(), eps, y.mutable_data(), y.shape(1));
  }
  void softmax(const Floats& x, int64_t n, Floats& y) {
    k_.softmax(x.data(), x.shape(1), x.shape(0), n, y.mutable_data(), y.shape(1));
  }
  void rope(const Floats& x, int64_t heads, int64_t head_dim, int64_t rotary, bool interleaved, const Floats& cos,
            const Floats& sin, Floats& y) {
    if (x.shape(1) < heads * head_dim || y.shape(1) < heads * head_dim || rotary > head_dim)
      throw std::invalid_argument("rope: wrong shape");
    expect(cos, x.shape(0) * rotary / 2, "cos");
    expect(sin, x.shape(0) * rotary / 2, "sin");
    k_.rope(x.data(), x.shape(1), x.shape(0), heads, head_dim, rotary, interleaved, cos.data(), sin.data(), rotary / 2,
            y.mutable_data(), y.shape(1));
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
  Floats attention(const KvCache& cache, int64_t layer, int64_t group, const Floats& q, const Array<int32_t>& begin,
                   const Array<int32_t>& end, float scale, float softcap, const py::object& mask, int64_t mask_token,
                   int64_t mask_head, const std::string& mode, int64_t step) {
    AttentionArgs a = {};
    a.layout = cache.layout(layer), a.chunks = cache.chunks(layer), a.group = group, a.tokens = q.shape(0);
    a.q = q.data(), a.ldq = q.shape(1), a.begin = begin.data(), a.end = end.data(), a.scale = scale;
    a.softcap = softcap, a.mask_token = mask_token, a.mask_head = mask_head;
    expect(begin, a.tokens, "begin");
    expect(end, a.tokens, "end");
    Floats m;
    if (!mask.is_none()) m = mask.cast<Floats>(), a.mask = m.data();
    a.ldo = a.layout.kv_heads * group * a.layout.value_dim;
    Floats out({a.tokens, a.ldo});
    a.out = out.mutable_data();
    int64_t chunks = 0;
    for (int64_t i = 0; i < a.tokens; i++) chunks = std::max<int64_t>(chunks, blocks(end.data()[i]));
    for (int64_t h = 0; h < a.layout.kv_heads; h++) {
      for (int64_t t = 0; t < a.tokens; t += step) {
        const int64_t t_end = std::min(t + step, a.tokens);
        if (mode == "rows") {
          k_.attention(a, h, t, t_end);
          continue;
        }
        const int64_t stride = (t_end - t) * group * partial_floats(a.layout);
        std::vector<float> partial(size_t(std::max<int64_t>(chunks, 1) * stride), 1e30f);
        for (int64_t c = 0; c < chunks; c++) k_.attention_partial(a, h, t, t_end, c, partial.data() + c * stride);
        k_.attention_merge(a, h, t, t_end, chunks, partial.data(), stride);
      }
    }
    return out;
  }

 private:
  static int64_t blocks(int64_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }

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
      .def("rope", &Table::rope)
      .def("kv_append", &Table::kv_append)
      .def("attention", &Table::attention, py::arg("cache"), py::arg("layer"), py::arg("group"), py::arg("q"),
           py::arg("begin"), py::arg("end"), py::arg("scale"), py::arg("softcap") = 0.0f, py::arg("mask") = py::none(),
           py::arg("mask_token") = 0, py::arg("mask_head") = 0, py::arg("mode") = "rows", py::arg("step") = 1 << 20);
  py::class_<KvCache>(m, "KvCache")
      .def(py::init([](const std::string& type, int64_t layers, int64_t heads, int64_t head_dim, int64_t value_dim,
                       int64_t limit, int64_t window) {
             return KvCache(std::vector<KvLayout>(size_t(layers), layout_of(type, heads, head_dim, value_dim)), limit,
                            std::vector<int64_t>(size_t(layers), window));
           }),
           py::arg("type"), py::arg("layers"), py::arg("heads"), py::arg("head_dim"), py::arg("value_dim"),
           py::arg("limit"), py::arg("window") = 0)
      .def_property_readonly("length", &KvCache::length)
      .def_property_readonly("bytes_alone", &KvCache::bytes_alone)
      .def_property_readonly("bytes_shared", &KvCache::bytes_shared)
      .def_property_readonly("shortest", &KvCache::shortest)
      .def("reserve", &KvCache::reserve)
      .def("advance", &KvCache::advance)
      .def("truncate", &KvCache::truncate)
      .def("release_unseen", &KvCache::release_unseen)
      .def("fork", &KvCache::fork)
      .def("save",
           [](const KvCache& c) {
             const auto bytes = c.save();
             return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
           })
      .def("load", [](KvCache& c, const std::string& bytes) {
        c.load(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
      });
  bind_pool(m);
}

}  // namespace edgeformer
