// edgeformer._native.testing: the KV cache without an engine.
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "program/kv_cache.h"

namespace edgeformer {
namespace {

KvLayout layout_of(const std::string& type, int64_t heads, int64_t head_dim, int64_t value_dim) {
  if (type != "int8" && type != "float32") throw std::invalid_argument("kv type is int8 or float32");
  if (head_dim > kMaxHeadDim || value_dim > kMaxHeadDim) throw std::invalid_argument("head_dim too large");
  return {type == "int8" ? KvType::int8 : KvType::float32, heads, head_dim, value_dim};
}

}  // namespace

void bind_kv_cache(py::module_& m) {
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
      .def_property_readonly("bytes_of_slabs", &KvCache::bytes_of_slabs)
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
}

}  // namespace edgeformer
