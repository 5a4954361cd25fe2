// Plain operations along an axis, not on the fast path: reduce, argmax, topk, softmax, cumsum.
#include <algorithm>
#include <cmath>

#include "ops/ops.h"
#include "ops/strided.h"

namespace edgeformer {
namespace {

// Axes before, at and behind `axis` as one [outer, size, inner].
struct Lines {
  int64_t outer = 1, size = 1, inner = 1;
  Lines(const Tensor& t, int64_t axis) {
    for (int i = 0; i < t.rank; ++i) (i < axis ? outer : i == axis ? size : inner) *= t.shape[i];
  }
  // Where line `i` begins in a tensor with `elements` along the axis; its elements stand `inner` apart.
  int64_t start(int64_t i, int64_t elements) const { return i / inner * elements * inner + i % inner; }
};

// An operation over lines: each along spec's `axis` of the first input.
class LineOp : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  Lines lines(const Run& run) const { return {in(run, 0), spec_.integer("axis")}; }
  int64_t units(const Run& run) const override {
    const Lines l = lines(run);
    return l.outer * l.inner;
  }
};

class Reduce final : public ParallelOp {
 public:
  Reduce(int index, const OpSpec& spec)
      : ParallelOp(index, spec), fn_(value_named(kReductions, "reduction", spec.name("fn"))) {}

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).count; }
  int64_t unit_cost(const Run& run) const override {
    return in(run, 0).count / std::max<int64_t>(1, out(run, 0).count);
  }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    const Strides own = contiguous(x);
    bool reduced[kMaxRank] = {};
    for (int64_t axis : spec_.ints.at("axes")) reduced[axis] = true;
    int64_t kept_size[kMaxRank], kept_step[kMaxRank], size[kMaxRank], step[kMaxRank];
    int kept = 0, gone = 0;
    int64_t count = 1;
    for (int a = 0; a < x.rank; ++a) {
      if (reduced[a]) {
        size[gone] = x.shape[a];
        step[gone++] = own[a];
        count *= x.shape[a];
      } else {
        kept_size[kept] = x.shape[a];
        kept_step[kept++] = own[a];
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      int64_t rest = i, base = 0;
      for (int a = kept - 1; a >= 0; --a) {
        base += rest % kept_size[a] * kept_step[a];
        rest /= kept_size[a];
      }
      if (x.dtype == DType::f32) {
        double acc = start();
        for (int64_t j = 0; j < count; ++j) add(&acc, x.f32()[base + offset(j, gone, size, step)]);
        y.f32()[i] = static_cast<float>(finish(acc, count));
      } else if (x.dtype == DType::i64) {
        y.i64()[i] = reduce_integers(x, base, count, gone, size, step);
      } else {
        bool any = fn_ == Reduction::min;  // of bools, max is "any" and min is "all"
        for (int64_t j = 0; j < count && any == (fn_ == Reduction::min); ++j) {
          any = x.boolean()[base + offset(j, gone, size, step)] != 0;
        }
        y.boolean()[i] = any;
      }
    }
  }

 private:
  static int64_t offset(int64_t j, int gone, const int64_t* size, const int64_t* step) {
    int64_t at = 0;
    for (int a = gone - 1; a >= 0; --a) {
      at += j % size[a] * step[a];
      j /= size[a];
    }
    return at;
  }
  double start() const {
    if (fn_ == Reduction::max) return -INFINITY;
    if (fn_ == Reduction::min) return INFINITY;
    return fn_ == Reduction::prod ? 1.0 : 0.0;
  }
  void add(double* acc, double v) const {
    switch (fn_) {
      case Reduction::mean:
      case Reduction::sum:
        *acc += v;
        break;
      case Reduction::max:
        *acc = std::isnan(v) || v > *acc ? v : *acc;
        break;
      case Reduction::min:
        *acc = std::isnan(v) || v < *acc ? v : *acc;
        break;
      case Reduction::prod:
        *acc *= v;
        break;
      case Reduction::l1:
        *acc += std::fabs(v);
        break;
      default:
        *acc += v * v;
    }
  }
  double finish(double acc, int64_t count) const {
    if (fn_ == Reduction::mean) return acc / static_cast<double>(count);
    return fn_ == Reduction::l2 ? std::sqrt(acc) : acc;
  }
  int64_t reduce_integers(const Tensor& x, int64_t base, int64_t count, int gone, const int64_t* size,
                          const int64_t* step) const {
    int64_t acc = fn_ == Reduction::prod  ? 1
                  : fn_ == Reduction::max ? INT64_MIN
                  : fn_ == Reduction::min ? INT64_MAX
                                          : 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t v = x.i64()[base + offset(j, gone, size, step)];
      if (fn_ == Reduction::max) {
        acc = std::max(acc, v);
      } else if (fn_ == Reduction::min) {
        acc = std::min(acc, v);
      } else if (fn_ == Reduction::prod) {
        acc *= v;
      } else {
        acc += fn_ == Reduction::sumsquare ? v * v : fn_ == Reduction::l1 && v < 0 ? -v : v;
      }
    }
    return fn_ == Reduction::mean && count ? acc / count : acc;
  }

  const Reduction fn_;
};

// Index of the largest (or smallest) along an axis, the first of equals.
class ArgExtreme final : public LineOp {
 public:
  using LineOp::LineOp;

 protected:
  int64_t unit_cost(const Run& run) const override { return in(run, 0).shape[spec_.integer("axis")]; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor& x = in(run, 0);
    const Lines l = lines(run);
    const bool smallest = spec_.integer("smallest") != 0;
    const auto search = [&](const auto* from) {
      for (int64_t i = begin; i < end; ++i) {
        const auto* line = from + l.start(i, l.size);
        int64_t best = 0;
        for (int64_t j = 1; j < l.size; ++j) {
          const auto v = line[j * l.inner], most = line[best * l.inner];
          if (smallest ? v < most : v > most) best = j;
        }
        out(run, 0).i64()[i] = best;
      }
    };
    if (x.dtype == DType::f32) {
      search(x.f32());
    } else {
      search(x.i64());
    }
  }
};

// The largest (or smallest) k along an axis, in order; equal values in order of their index.
class TopK final : public LineOp {
 public:
  using LineOp::LineOp;

 protected:
  int64_t unit_cost(const Run& run) const override { return 8 * in(run, 0).shape[spec_.integer("axis")]; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor& x = in(run, 0);
    const Lines l = lines(run);
    const int64_t k = out(run, 1).shape[spec_.integer("axis")];
    if (k > l.size) throw InputProblem("TopK of more elements than there are");
    const bool largest = spec_.integer("largest") != 0;
    std::vector<int64_t> order(l.size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t base = l.start(i, l.size);
      const int64_t to = l.start(i, k);
      for (int64_t j = 0; j < l.size; ++j) order[j] = j;
      const auto pick = [&](auto* from, auto* values) {
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t a, int64_t b) {
          const auto u = from[base + a * l.inner], v = from[base + b * l.inner];
          return u != v ? (largest ? u > v : u < v) : a < b;
        });
        for (int64_t j = 0; j < k; ++j) {
          values[to + j * l.inner] = from[base + order[j] * l.inner];
          out(run, 1).i64()[to + j * l.inner] = order[j];
        }
      };
      if (x.dtype == DType::f32) {
        pick(x.f32(), out(run, 0).f32());
      } else {
        pick(x.i64(), out(run, 0).i64());
      }
    }
  }
};

class Softmax final : public LineOp {
 public:
  using LineOp::LineOp;

 protected:
  int64_t unit_cost(const Run& run) const override { return 8 * in(run, 0).shape[spec_.integer("axis")]; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    const Lines l = lines(run);
    const bool log = spec_.integer("log") != 0;
    if (l.inner == 1 && !log) {
      run.k->softmax(x.f32() + begin * l.size, l.size, end - begin, l.size, y.f32() + begin * l.size, l.size);
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t base = l.start(i, l.size);
      float most = -INFINITY;
      for (int64_t j = 0; j < l.size; ++j) most = std::max(most, x.f32()[base + j * l.inner]);
      double sum = 0;
      for (int64_t j = 0; j < l.size; ++j) sum += std::exp(static_cast<double>(x.f32()[base + j * l.inner] - most));
      for (int64_t j = 0; j < l.size; ++j) {
        const double v = x.f32()[base + j * l.inner] - most;
        y.f32()[base + j * l.inner] = static_cast<float>(log ? v - std::log(sum) : std::exp(v) / sum);
      }
    }
  }
};

class CumSum final : public LineOp {
 public:
  using LineOp::LineOp;

 protected:
  int64_t unit_cost(const Run& run) const override { return in(run, 0).shape[spec_.integer("axis")]; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    const Lines l = lines(run);
    const bool exclusive = spec_.integer("exclusive") != 0, reverse = spec_.integer("reverse") != 0;
    const auto scan = [&](auto* from, auto* to, auto zero) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t base = l.start(i, l.size);
        auto acc = zero;
        for (int64_t j = 0; j < l.size; ++j) {
          const int64_t at = base + (reverse ? l.size - 1 - j : j) * l.inner;
          const auto v = from[at];
          to[at] = exclusive ? acc : static_cast<decltype(zero)>(acc + v);
          acc += v;
        }
      }
    };
    if (x.dtype == DType::f32) {
      scan(x.f32(), y.f32(), 0.0f);
    } else {
      scan(x.i64(), y.i64(), int64_t{0});
    }
  }
};

}  // namespace

std::unique_ptr<Op> make_axis_op(int index, const OpSpec& spec) {
  if (spec.kind == "reduce") return std::make_unique<Reduce>(index, spec);
  if (spec.kind == "argmax") return std::make_unique<ArgExtreme>(index, spec);
  if (spec.kind == "topk") return std::make_unique<TopK>(index, spec);
  if (spec.kind == "softmax") return std::make_unique<Softmax>(index, spec);
  if (spec.kind == "cumsum") return std::make_unique<CumSum>(index, spec);
  return nullptr;
}

}  // namespace edgeformer
