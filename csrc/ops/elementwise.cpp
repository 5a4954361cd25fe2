// Elementwise operations with broadcasting: unary, binary, where, not, cast, clip.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/ops.h"
#include "ops/strided.h"

namespace edgeformer {
namespace {

[[noreturn]] void mismatch(const Run& run, const OpSpec& spec) {
  throw InputProblem("inputs of " + spec.kind + " that makes " + run.spec->slots[spec.outputs[0]].name +
                     " have sizes that do not fit together");
}

class UnaryOp final : public ParallelOp {
 public:
  UnaryOp(int index, const OpSpec& spec)
      : ParallelOp(index, spec), fn_(value_named(kUnaryTable, "function", spec.name("fn"))) {}

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).count; }
  int64_t unit_cost(const Run&) const override { return 4; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor& x = in(run, 0);
    if (x.dtype == DType::f32) {
      run.k->unary(fn_, x.f32() + begin, out(run, 0).f32() + begin, end - begin);
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t v = x.i64()[i];
      out(run, 0).i64()[i] = fn_ == Unary::neg ? -v : (v < 0 ? -v : v);
    }
  }

 private:
  const Unary fn_;
};

// ONNX Pow. Squares and square roots are exact operations; the rest is computed in double.
float power(float a, float b) {
  if (b == 2.0f) return a * a;
  if (b == 0.5f) return std::sqrt(a);
  return static_cast<float>(std::pow(static_cast<double>(a), static_cast<double>(b)));
}

template <class T>
T arithmetic(Binary op, T a, T b);

template <>
float arithmetic<float>(Binary op, float a, float b) {
  switch (op) {
    case Binary::add:
      return a + b;
    case Binary::sub:
      return a - b;
    case Binary::mul:
      return a * b;
    case Binary::div:
      return a / b;
    case Binary::pow:
      return power(a, b);
    case Binary::min:
      return std::isnan(a) || a < b ? a : b;
    case Binary::max:
      return std::isnan(a) || a > b ? a : b;
    default:
      return static_cast<float>(std::fmod(static_cast<double>(a), static_cast<double>(b)));
  }
}

template <>
int64_t arithmetic<int64_t>(Binary op, int64_t a, int64_t b) {
  switch (op) {
    case Binary::add:
      return a + b;
    case Binary::sub:
      return a - b;
    case Binary::mul:
      return a * b;
    case Binary::div:
      if (b == 0) throw InputProblem("integer division by zero");
      return a / b;
    case Binary::pow:
      return static_cast<int64_t>(std::pow(static_cast<double>(a), static_cast<double>(b)));
    case Binary::min:
      return std::min(a, b);
    case Binary::max:
      return std::max(a, b);
    default: {
      if (b == 0) throw InputProblem("integer remainder by zero");
      const int64_t r = a % b;
      return r != 0 && ((r < 0) != (b < 0)) ? r + b : r;
    }
  }
}

template <class T>
bool compare(Binary op, T a, T b) {
  switch (op) {
    case Binary::equal:
      return a == b;
    case Binary::less:
      return a < b;
    case Binary::less_equal:
      return a <= b;
    case Binary::greater:
      return a > b;
    case Binary::greater_equal:
      return a >= b;
    case Binary::logic_and:
      return a && b;
    case Binary::logic_or:
      return a || b;
    default:
      return (a != 0) != (b != 0);
  }
}

// One operand of a row: its first element and the step to the next, 0 if it is the same for the whole row.
struct Operand {
  const float* at;
  int64_t step;
};

// The loop over a row is instantiated for the common float operations, so that the compiler vectorizes them.
template <class F>
void row_loop(const Operand& a, const Operand& b, float* y, int64_t n, F f) {
  const float *u = a.at, *v = b.at;
  if (a.step == 1 && b.step == 1) {
    for (int64_t i = 0; i < n; ++i) y[i] = f(u[i], v[i]);
  } else if (a.step == 1 && b.step == 0) {
    const float w = v[0];
    for (int64_t i = 0; i < n; ++i) y[i] = f(u[i], w);
  } else if (a.step == 0 && b.step == 1) {
    const float w = u[0];
    for (int64_t i = 0; i < n; ++i) y[i] = f(w, v[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = f(u[i * a.step], v[i * b.step]);
  }
}

void float_row(Binary op, const Operand& a, const Operand& b, float* y, int64_t n) {
  switch (op) {
    case Binary::add:
      return row_loop(a, b, y, n, [](float u, float v) { return u + v; });
    case Binary::sub:
      return row_loop(a, b, y, n, [](float u, float v) { return u - v; });
    case Binary::mul:
      return row_loop(a, b, y, n, [](float u, float v) { return u * v; });
    case Binary::div:
      return row_loop(a, b, y, n, [](float u, float v) { return u / v; });
    default:
      return row_loop(a, b, y, n, [op](float u, float v) { return arithmetic<float>(op, u, v); });
  }
}

class BinaryOp final : public ParallelOp {
 public:
  BinaryOp(int index, const OpSpec& spec)
      : ParallelOp(index, spec), fn_(value_named(kBinaries, "function", spec.name("fn"))) {}
  int64_t begin(Run& run, int phase) const override {
    if (!broadcasts(in(run, 0), out(run, 0)) || !broadcasts(in(run, 1), out(run, 0))) mismatch(run, spec_);
    return ParallelOp::begin(run, phase);
  }

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).rows(); }
  int64_t unit_cost(const Run& run) const override { return out(run, 0).columns(); }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &a = in(run, 0), &b = in(run, 1), &y = out(run, 0);
    const std::array<Strides, 2> strides{broadcast_strides(a, y), broadcast_strides(b, y)};
    const int64_t n = y.columns(), sa = y.rank ? strides[0][y.rank - 1] : 0, sb = y.rank ? strides[1][y.rank - 1] : 0;
    for_rows<2>(y, strides, begin, end, [&](int64_t row, const std::array<int64_t, 2>& at) {
      if (y.dtype == DType::f32) {
        float_row(fn_, {a.f32() + at[0], sa}, {b.f32() + at[1], sb}, y.f32() + row * n, n);
      } else if (y.dtype == DType::i64) {
        for (int64_t i = 0; i < n; ++i) {
          y.i64()[row * n + i] = arithmetic<int64_t>(fn_, a.i64()[at[0] + i * sa], b.i64()[at[1] + i * sb]);
        }
      } else {
        for (int64_t i = 0; i < n; ++i) y.boolean()[row * n + i] = compared(a, at[0] + i * sa, b, at[1] + i * sb);
      }
    });
  }

 private:
  bool compared(const Tensor& a, int64_t i, const Tensor& b, int64_t j) const {
    if (a.dtype == DType::f32) return compare(fn_, a.f32()[i], b.f32()[j]);
    if (a.dtype == DType::i64) return compare(fn_, a.i64()[i], b.i64()[j]);
    return compare(fn_, a.boolean()[i], b.boolean()[j]);
  }

  const Binary fn_;
};

class Where final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;
  int64_t begin(Run& run, int phase) const override {
    for (int i = 0; i < 3; ++i) {
      if (!broadcasts(in(run, i), out(run, 0))) mismatch(run, spec_);
    }
    return ParallelOp::begin(run, phase);
  }

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).rows(); }
  int64_t unit_cost(const Run& run) const override { return out(run, 0).columns(); }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &c = in(run, 0), &a = in(run, 1), &b = in(run, 2), &y = out(run, 0);
    const std::array<Strides, 3> s{broadcast_strides(c, y), broadcast_strides(a, y), broadcast_strides(b, y)};
    const int64_t n = y.columns();
    const int last = y.rank - 1;
    const auto fill = [&](auto* to, const auto* from_a, const auto* from_b) {
      for_rows<3>(y, s, begin, end, [&](int64_t row, const std::array<int64_t, 3>& at) {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t k = last < 0 ? 0 : i;
          const bool take = c.boolean()[at[0] + k * (last < 0 ? 0 : s[0][last])] != 0;
          to[row * n + i] =
              take ? from_a[at[1] + k * (last < 0 ? 0 : s[1][last])] : from_b[at[2] + k * (last < 0 ? 0 : s[2][last])];
        }
      });
    };
    if (y.dtype == DType::f32) {
      fill(y.f32(), a.f32(), b.f32());
    } else if (y.dtype == DType::i64) {
      fill(y.i64(), a.i64(), b.i64());
    } else {
      fill(y.boolean(), a.boolean(), b.boolean());
    }
  }
};

class Not final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).count; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    for (int64_t i = begin; i < end; ++i) out(run, 0).boolean()[i] = !in(run, 0).boolean()[i];
  }
};

int64_t truncated(float v) {
  if (std::isnan(v)) return 0;
  constexpr float limit = 9.2233715e18f;  // the largest float below 2^63
  return static_cast<int64_t>(std::min(std::max(v, -limit), limit));
}

class Cast final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).count; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    for (int64_t i = begin; i < end; ++i) {
      switch (y.dtype) {
        case DType::f32:
          y.f32()[i] = x.dtype == DType::i64 ? static_cast<float>(x.i64()[i]) : static_cast<float>(x.boolean()[i]);
          break;
        case DType::i64:
          y.i64()[i] = x.dtype == DType::f32 ? truncated(x.f32()[i]) : static_cast<int64_t>(x.boolean()[i]);
          break;
        default:
          y.boolean()[i] = x.dtype == DType::f32 ? x.f32()[i] != 0.0f : x.i64()[i] != 0;
      }
    }
  }
};

class Clip final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).count; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    const double low = spec_.floats.at("bounds")[0], high = spec_.floats.at("bounds")[1];
    for (int64_t i = begin; i < end; ++i) {
      if (x.dtype == DType::f32) {
        y.f32()[i] = std::min(std::max(x.f32()[i], static_cast<float>(low)), static_cast<float>(high));
      } else {
        const double v = static_cast<double>(x.i64()[i]);
        y.i64()[i] = v < low ? static_cast<int64_t>(low) : v > high ? static_cast<int64_t>(high) : x.i64()[i];
      }
    }
  }
};

}  // namespace

std::unique_ptr<Op> make_elementwise_op(int index, const OpSpec& spec) {
  if (spec.kind == "unary") return std::make_unique<UnaryOp>(index, spec);
  if (spec.kind == "binary") return std::make_unique<BinaryOp>(index, spec);
  if (spec.kind == "where") return std::make_unique<Where>(index, spec);
  if (spec.kind == "not") return std::make_unique<Not>(index, spec);
  if (spec.kind == "cast") return std::make_unique<Cast>(index, spec);
  if (spec.kind == "clip") return std::make_unique<Clip>(index, spec);
  return nullptr;
}

}  // namespace edgeformer
