// edgeformer._native.exponential_sums and places_reaching: passes over the scores of a whole vocabulary.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "engine/dispatch.h"

namespace edgeformer {
namespace {

constexpr int64_t kPiece = 4096;  // scores whose places are on the stack

using Scores = py::array_t<float, py::array::c_style>;

const Kernels& kernels() {
  static const Kernels table = kernels_for("");
  return table;
}

void expect_row(const Scores& scores) {
  if (scores.ndim() != 1) raise("InputError", text("the scores have ", scores.ndim(), " dimensions, expected 1"));
}

py::tuple sums_of(const Scores& scores, float top) {
  expect_row(scores);
  py::array_t<double> sums((scores.size() + kSumBlock - 1) / kSumBlock);
  double slope = 0;
  {
    const float* x = scores.data();
    double* out = sums.mutable_data();
    const int64_t n = scores.size();
    py::gil_scoped_release unlocked;
    slope = kernels().exponential_sums(x, n, top, out);
  }
  return py::make_tuple(std::move(sums), slope);
}

py::array_t<int64_t> places_of(const Scores& scores, float bound) {
  expect_row(scores);
  std::vector<int64_t> places;
  {
    const float* x = scores.data();
    const int64_t n = scores.size();
    py::gil_scoped_release unlocked;
    int64_t found[kPiece];
    for (int64_t begin = 0; begin < n; begin += kPiece) {
      const int64_t count = kernels().places_reaching(x + begin, std::min(kPiece, n - begin), bound, found);
      for (int64_t i = 0; i < count; i++) places.push_back(begin + found[i]);
    }
  }
  return py::array_t<int64_t>(py::ssize_t(places.size()), places.data());
}

}  // namespace

void bind_sampling(py::module_& m) {
  m.attr("SUM_BLOCK") = kSumBlock;
  m.def("exponential_sums", &sums_of, py::arg("scores").noconvert(), py::arg("top"),
        "(the sums of exp(scores - top) by blocks of SUM_BLOCK, the sum of exp(scores - top) * (scores - top)).");
  m.def("places_reaching", &places_of, py::arg("scores").noconvert(), py::arg("bound"),
        "The places, ascending, of the scores that are at least `bound`.");
}

}  // namespace edgeformer
