// Plain products of activations, not on the fast path: matmul, gemm, conv.
#include <algorithm>

#include "ops/ops.h"
#include "ops/strided.h"

namespace edgeformer {
namespace {

struct RowProduct {
  const float* a;
  int64_t a_step;
  const float* b;
  int64_t b_step_k, b_step_n;
  int64_t k, n;
};

// c[n] += sum over k of a[k * a_step] * b[k * b_step_k + n * b_step_n], k ascending.
void row_product(const RowProduct& p, float* c) {
  for (int64_t i = 0; i < p.k; ++i) {
    const float v = p.a[i * p.a_step];
    const float* row = p.b + i * p.b_step_k;
    if (p.b_step_n == 1) {
      for (int64_t j = 0; j < p.n; ++j) c[j] += v * row[j];
    } else {
      for (int64_t j = 0; j < p.n; ++j) c[j] += v * row[j * p.b_step_n];
    }
  }
}

// Batched product of two activations, [..., m, k] x [..., k, n].
class MatMul final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;
  int64_t begin(Run& run, int phase) const override {
    const Tensor &a = in(run, 0), &b = in(run, 1);
    if (a.columns() != b.shape[b.rank - 2]) {
      throw InputProblem("MatMul that makes " + run.spec->slots[spec_.outputs[0]].name + ": inner sizes differ");
    }
    for (const Tensor* t : {&a, &b}) {
      for (int i = 0; i < t->rank - 2; ++i) {
        if (t->shape[i] != 1 && t->shape[i] != out(run, 0).shape[out(run, 0).rank - t->rank + i]) {
          throw InputProblem("MatMul that makes " + run.spec->slots[spec_.outputs[0]].name +
                             ": batches have sizes that do not fit together");
        }
      }
    }
    return ParallelOp::begin(run, phase);
  }

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).rows(); }
  int64_t unit_cost(const Run& run) const override { return in(run, 0).columns() * out(run, 0).columns(); }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &a = in(run, 0), &b = in(run, 1), &y = out(run, 0);
    const int64_t n = y.columns(), k = a.columns();
    Strides sa = batch_strides(a, y), sb = batch_strides(b, y);
    sa[y.rank - 2] = k;
    sb[y.rank - 2] = 0;
    for_rows<2>(y, {sa, sb}, begin, end, [&](int64_t row, const std::array<int64_t, 2>& at) {
      float* c = y.f32() + row * n;
      std::fill_n(c, n, 0.0f);
      row_product({a.f32() + at[0], 1, b.f32() + at[1], n, 1, k, n}, c);
    });
  }

 private:
  static Strides batch_strides(const Tensor& t, const Tensor& out) {
    const Strides own = contiguous(t);
    Strides s{};
    for (int i = 0; i < t.rank - 2; ++i) s[out.rank - t.rank + i] = t.shape[i] == 1 ? 0 : own[i];
    return s;
  }
};

class Gemm final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).rows(); }
  int64_t unit_cost(const Run& run) const override { return in(run, 0).columns() * out(run, 0).columns(); }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &a = in(run, 0), &b = in(run, 1), &y = out(run, 0);
    const bool ta = spec_.integer("trans_a") != 0, tb = spec_.integer("trans_b") != 0;
    const float alpha = spec_.number("alpha"), beta = spec_.number("beta");
    const int64_t n = y.columns(), k = ta ? a.shape[0] : a.shape[1];
    const Strides sc = has_in(2) ? broadcast_strides(in(run, 2), y) : Strides{};
    for (int64_t r = begin; r < end; ++r) {
      float* c = y.f32() + r * n;
      std::fill_n(c, n, 0.0f);
      row_product({a.f32() + (ta ? r : r * k), ta ? a.shape[1] : 1, b.f32(), tb ? 1 : n, tb ? k : 1, k, n}, c);
      for (int64_t j = 0; j < n; ++j) {
        c[j] *= alpha;
        if (has_in(2)) c[j] += beta * in(run, 2).f32()[r * sc[0] + j * sc[1]];
      }
    }
  }
};

// Convolution of any rank up to 3 by plain loops; a unit is one row of the output's last axis.
class Conv final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).rows(); }
  int64_t unit_cost(const Run& run) const override {
    return in(run, 1).count / in(run, 1).shape[0] * out(run, 0).columns();
  }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &w = in(run, 1), &y = out(run, 0);
    const int n = y.rank - 2;
    const std::vector<int64_t>&stride = spec_.ints.at("strides"), &dilation = spec_.ints.at("dilations");
    const std::vector<int64_t>& pads = spec_.ints.at("pads");
    const int64_t channels = w.shape[1], per_group = w.shape[0] / spec_.integer("group");
    int64_t taps = 1;
    for (int i = 0; i < n; ++i) taps *= w.shape[2 + i];
    const Strides sx = contiguous(x);
    const int64_t width = y.columns(), in_width = x.columns(), step = stride[n - 1];
    for (int64_t row = begin; row < end; ++row) {
      int64_t rest = row, position[kMaxRank] = {};
      for (int i = n - 2; i >= 0; --i) {
        position[i] = rest % y.shape[2 + i];
        rest /= y.shape[2 + i];
      }
      const int64_t out_channel = rest % y.shape[1], sample = rest / y.shape[1];
      float* to = y.f32() + row * width;
      std::fill_n(to, width, has_in(2) ? in(run, 2).f32()[out_channel] : 0.0f);
      for (int64_t c = 0; c < channels; ++c) {
        const float* plane = x.f32() + sample * sx[0] + (out_channel / per_group * channels + c) * sx[1];
        const float* kernel = w.f32() + (out_channel * channels + c) * taps;
        for (int64_t t = 0; t < taps; ++t) {
          int64_t tap[kMaxRank] = {}, tap_rest = t, at = 0;
          bool inside = true;
          for (int i = n - 1; i >= 0; --i) {
            tap[i] = tap_rest % w.shape[2 + i];
            tap_rest /= w.shape[2 + i];
          }
          for (int i = 0; i < n - 1; ++i) {
            const int64_t p = position[i] * stride[i] + tap[i] * dilation[i] - pads[i];
            inside = inside && p >= 0 && p < x.shape[2 + i];
            at += p * sx[2 + i];
          }
          if (!inside) continue;
          const int64_t first = tap[n - 1] * dilation[n - 1] - pads[n - 1];
          const float v = kernel[t];
          for (int64_t j = 0; j < width; ++j) {
            const int64_t p = first + j * step;
            if (p >= 0 && p < in_width) to[j] += v * plane[at + p];
          }
        }
      }
    }
  }
};

}  // namespace

std::unique_ptr<Op> make_math_op(int index, const OpSpec& spec) {
  if (spec.kind == "matmul") return std::make_unique<MatMul>(index, spec);
  if (spec.kind == "gemm") return std::make_unique<Gemm>(index, spec);
  if (spec.kind == "conv") return std::make_unique<Conv>(index, spec);
  return nullptr;
}

}  // namespace edgeformer
