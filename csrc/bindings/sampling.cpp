// edgeformer._native.exponential_sums and places_reaching: passes over the scores of a whole vocabulary.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "engine/dispatch.h"

namespace edgeformer {
namespace {

constexpr int64_t kSumBlock = 256;  // exponentials of one sum
constexpr int64_t kSumLanes = 16;   // sums side by side in a block
constexpr int64_t kPiece = 8 * kSumBlock;
// Four lanes, which GCC and clang have on every CPU. (They compare longer ones number by number where those are no
// registers.) The order of a sum, and so its bits, are the same everywhere.
typedef float Lanes __attribute__((vector_size(16)));
constexpr int64_t kVectors = kSumLanes / 4;

Lanes load(const float* x) {
  Lanes v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

// v[0] + ... + v[kVectors - 1], two by two, and then their lanes in float64.
double total(const Lanes* v) {
  static_assert(kVectors == 4, "");
  const Lanes s = (v[0] + v[1]) + (v[2] + v[3]);
  return (double(s[0]) + double(s[1])) + (double(s[2]) + double(s[3]));
}

// sums[b] = sum_i e[i] over block b, e[i] = exp(x[i] - top); the result is sum_i e[i] * (x[i] - top) over all. x of -inf
// adds 0 to both. Each lane adds kSumBlock / kSumLanes float32 numbers and two more sums, all else is float64: a sum of
// exponentials is off by at most 18 * 2^-24 of itself.
double exponential_sums(const Kernels& k, const float* x, int64_t n, float top, double* sums) {
  double slope = 0;
  alignas(64) float shifted[kPiece], e[kPiece];
  const Lanes low = Lanes{} - 1e4f;  // exp gives 0 there, and 0 * -1e4 is no NaN
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t count = std::min(kPiece, n - begin), padded = (count + kSumBlock - 1) / kSumBlock * kSumBlock;
    const float* piece = x + begin;
    if (padded > count) {  // the last one
      std::copy(piece, x + n, e);
      std::fill(e + count, e + padded, -HUGE_VALF);
      piece = e;
    }
    for (int64_t i = 0; i < padded; i += 4) {
      Lanes s = load(piece + i) - top;
      s = s < low ? low : s;
      std::memcpy(shifted + i, &s, sizeof s);
    }
    k.unary(Unary::exp, shifted, e, padded);
    for (int64_t block = 0; block < padded; block += kSumBlock) {
      Lanes sum[kVectors] = {}, product[kVectors] = {};
      for (int64_t i = block; i < block + kSumBlock; i += kSumLanes)
        for (int64_t v = 0; v < kVectors; v++) {
          const Lanes a = load(e + i + 4 * v);
          sum[v] += a;
          product[v] += a * load(shifted + i + 4 * v);
        }
      *sums++ = total(sum);
      slope += total(product);
    }
  }
  return slope;
}

using Scores = py::array_t<float, py::array::c_style>;

void expect_row(const Scores& scores) {
  if (scores.ndim() != 1) raise("InputError", text("the scores have ", scores.ndim(), " dimensions, expected 1"));
}

py::tuple sums_of(const Scores& scores, float top) {
  static const Kernels kernels = kernels_for("");
  expect_row(scores);
  py::array_t<double> sums((scores.size() + kSumBlock - 1) / kSumBlock);
  double slope = 0;
  {
    const float* x = scores.data();
    double* out = sums.mutable_data();
    const int64_t n = scores.size();
    py::gil_scoped_release unlocked;
    slope = exponential_sums(kernels, x, n, top, out);
  }
  return py::make_tuple(std::move(sums), slope);
}

// The i with x[i] >= bound, ascending. Few are expected: sixteen numbers are skipped by one test.
std::vector<int64_t> places_reaching(const float* x, int64_t n, float bound) {
  std::vector<int64_t> places;
  int64_t begin = 0;
  for (; begin + kSumLanes <= n; begin += kSumLanes) {
    const float* p = x + begin;
    const auto reached = (load(p) >= bound) | (load(p + 4) >= bound) | (load(p + 8) >= bound) | (load(p + 12) >= bound);
    uint64_t any[2];  // a lane is -1 or 0
    static_assert(sizeof reached == sizeof any, "");
    std::memcpy(any, &reached, sizeof any);
    if (!(any[0] | any[1])) continue;
    for (int64_t l = 0; l < kSumLanes; l++)
      if (x[begin + l] >= bound) places.push_back(begin + l);
  }
  for (; begin < n; begin++)
    if (x[begin] >= bound) places.push_back(begin);
  return places;
}

py::array_t<int64_t> places_of(const Scores& scores, float bound) {
  expect_row(scores);
  std::vector<int64_t> places;
  {
    const float* x = scores.data();
    const int64_t n = scores.size();
    py::gil_scoped_release unlocked;
    places = places_reaching(x, n, bound);
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
