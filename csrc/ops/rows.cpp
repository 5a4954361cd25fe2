// Row operations: norm, quantize, embed, keep, rope; and the operations that are made of independent units.
#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/pack.h"
#include "ops/ops.h"

namespace edgeformer {
namespace {

constexpr int64_t kSerialElements = 8192;  // a barrier costs about as much as touching so many floats

// y = norm(x) * weight (+ bias), as floats, quantized, or both.
class Norm final : public ParallelOp {
 public:
  Norm(int index, const OpSpec& spec)
      : ParallelOp(index, spec),
        layer_(value_named(kNorms, "norm", spec.name("kind")) == NormKind::layer),
        eps_(spec.number("eps")) {}
  size_t scratch_bytes(const Run& run) const override { return in(run, 0).columns() * sizeof(float); }

 protected:
  int64_t units(const Run& run) const override { return in(run, 0).rows(); }
  int64_t unit_cost(const Run& run) const override { return in(run, 0).columns(); }
  void run_units(Run& run, int64_t begin, int64_t end, int thread) const override {
    const Tensor& x = in(run, 0);
    const int64_t n = x.columns();
    const float* weight = has_in(1) ? in(run, 1).f32() : nullptr;
    const float* bias = has_in(2) ? in(run, 2).f32() : nullptr;
    for (int64_t r = begin; r < end; ++r) {
      float* y = has_out(0) ? out(run, 0).f32() + r * n : reinterpret_cast<float*>(run.scratch[thread]);
      const auto norm = layer_ ? run.k->layer_norm : run.k->rms_norm;
      norm({.x = x.f32() + r * n,
            .ldx = n,
            .m = 1,
            .n = n,
            .weight = weight,
            .bias = bias,
            .eps = eps_,
            .y = y,
            .ldy = n});
      if (has_out(1)) quantize_rows(run, out(run, 1), {y, n, r, 1, 0, blocks_of(n)});
    }
  }

 private:
  const bool layer_;
  const float eps_;
};

class Quantize final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return in(run, 0).rows(); }
  int64_t unit_cost(const Run& run) const override { return in(run, 0).columns(); }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor& x = in(run, 0);
    const int64_t n = x.columns();
    quantize_rows(run, out(run, 0), {x.f32() + begin * n, n, begin, end - begin, 0, blocks_of(n)});
  }
};

class Embed final : public ParallelOp {
 public:
  Embed(int index, const OpSpec& spec) : ParallelOp(index, spec), scale_(spec.number("scale")) {}

 protected:
  int64_t units(const Run& run) const override { return in(run, 0).count; }
  int64_t unit_cost(const Run& run) const override { return 4 * out(run, 0).columns(); }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const WeightSpec& w = run.spec->weights[spec_.weights[0]];
    for (int64_t i = begin; i < end; ++i) {
      int64_t id = in(run, 0).i64()[i];
      if (id < 0 && id >= -w.n) id += w.n;
      if (id < 0 || id >= w.n) {
        throw InputProblem(run.spec->slots[spec_.inputs[0]].name + " holds " + std::to_string(id) + ", expected 0 to " +
                           std::to_string(w.n - 1));
      }
      float* y = out(run, 0).f32() + i * w.k;
      unpack_row(w.type, run.weights[spec_.weights[0]], w.k, id, y);
      if (scale_ != 1.0f) {
        for (int64_t c = 0; c < w.k; ++c) y[c] *= scale_;
      }
    }
  }

 private:
  const float scale_;
};

// The last `kept` rows of every segment of x [batch, sequence, ...]; a row is x[b, s], of any rank.
class Keep final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor& x = in(run, 0);
    const int64_t rows = x.shape[0] * x.shape[1];
    const size_t row_bytes = rows ? x.bytes() / rows : 0;
    const uint8_t* from = static_cast<const uint8_t*>(x.data);
    uint8_t* to = static_cast<uint8_t*>(out(run, 0).data);
    for (const Segment& s : run.segments) {
      if (s.kept) std::memcpy(to, from + (s.row + s.rows - s.kept) * row_bytes, s.kept * row_bytes);
      to += s.kept * row_bytes;
    }
    return 0;
  }
};

// x [rows, heads, head_dim] rotated by cos, sin [rows, rotary / 2].
class Rope final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return in(run, 1).rows(); }
  int64_t unit_cost(const Run& run) const override {
    const Tensor& x = in(run, 0);
    return x.shape[x.rank - 1] * x.shape[x.rank - 2];
  }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &cos = in(run, 1);
    const int64_t d = x.shape[x.rank - 1], heads = x.shape[x.rank - 2], ld = heads * d, ldc = cos.columns();
    run.k->rope({.x = x.f32() + begin * ld,
                 .ldx = ld,
                 .m = end - begin,
                 .heads = heads,
                 .head_dim = d,
                 .rotary = spec_.integer("rotary"),
                 .interleaved = spec_.integer("interleaved") != 0,
                 .cos = cos.f32() + begin * ldc,
                 .sin = in(run, 2).f32() + begin * ldc,
                 .ldc = ldc,
                 .y = out(run, 0).f32() + begin * ld,
                 .ldy = ld});
  }
};

}  // namespace

int64_t ParallelOp::begin(Run& run, int) const {
  const int64_t n = units(run);
  if (n <= 0) return 0;
  const int64_t cost = std::max<int64_t>(1, unit_cost(run));
  if (run.threads == 1 || n * cost <= kSerialElements || n == 1) {
    run_units(run, 0, n, 0);
    return 0;
  }
  const int64_t grain = std::max<int64_t>(kSerialElements / 2 / cost, (n + run.threads * 8 - 1) / (run.threads * 8));
  const ParallelPlan p{n, std::max<int64_t>(1, grain)};
  run.plans[index_] = p;
  return (n + p.grain - 1) / p.grain;
}

void ParallelOp::work(Run& run, int, int64_t chunk, int thread) const {
  const ParallelPlan& p = plan<ParallelPlan>(run);
  run_units(run, chunk * p.grain, std::min(p.units, (chunk + 1) * p.grain), thread);
}

std::unique_ptr<Op> make_row_op(int index, const OpSpec& spec) {
  if (spec.kind == "norm") return std::make_unique<Norm>(index, spec);
  if (spec.kind == "quantize") return std::make_unique<Quantize>(index, spec);
  if (spec.kind == "embed") return std::make_unique<Embed>(index, spec);
  if (spec.kind == "keep") return std::make_unique<Keep>(index, spec);
  if (spec.kind == "rope") return std::make_unique<Rope>(index, spec);
  return nullptr;
}

std::unique_ptr<Op> make_op(int index, const OpSpec& spec) {
  for (auto make : {make_row_op, make_linear_op, make_attention_op, make_history_op, make_elementwise_op,
                    make_pointwise_op, make_shape_op, make_axis_op, make_math_op}) {
    if (auto op = make(index, spec)) return op;
  }
  throw UnknownName("the program has the operation '" + spec.kind + "', which this build does not know");
}

}  // namespace edgeformer
