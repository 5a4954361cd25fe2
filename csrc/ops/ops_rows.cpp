// Row operations: norm, quantize, linear, embed, keep, rope.
#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/pack.h"
#include "ops/ops.h"

namespace edgeformer {
namespace {

constexpr int64_t kSerialElements = 8192;  // a barrier costs about as much as touching so many floats
constexpr int64_t kRowTile = 256;          // most rows of activations that one chunk of a prefill works on
constexpr int64_t kLeastRowTile = 32;
constexpr int64_t kChunksPerThread = 6;  // at least, so that a thread that was interrupted delays the others little
constexpr int64_t kUnit = 32;            // output columns of the smallest chunk: one activation block
constexpr int64_t kPrefillUnits = 2;

void quantize_rows(const Run& run, const float* x, int64_t ldx, const Tensor& q, int64_t row, int64_t rows,
                   int64_t block_begin, int64_t block_end) {
  const int64_t blocks = blocks_of(q.columns());
  run.k->quantize(x, ldx, rows, q.columns(), q.span(), block_begin, block_end, q.xq() + row * blocks * kBlock,
                  q.xb() + row * blocks);
}

// y = norm(x) * weight (+ bias), as floats, quantized, or both.
class Norm final : public ParallelOp {
 public:
  Norm(int index, const OpSpec& spec)
      : ParallelOp(index, spec), layer_(spec.integer("layer") != 0), eps_(spec.number("eps")) {}
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
      const float* row = x.f32() + r * n;
      if (layer_) {
        run.k->layer_norm(row, n, 1, n, weight, bias, eps_, y, n);
      } else {
        run.k->rms_norm(row, n, 1, n, weight, eps_, y, n);
      }
      if (has_out(1)) quantize_rows(run, y, n, out(run, 1), r, 1, 0, blocks_of(n));
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
    quantize_rows(run, x.f32() + begin * n, n, out(run, 0), begin, end - begin, 0, blocks_of(n));
  }
};

// One or several products with the same input:
//   y_p = activation(x W_p^T + bias) * factor + residual,  or  activation(x G_p^T + bias) * (x W_p^T + bias)
// A chunk is a tile of rows and of output columns (a multiple of 32, so that it can be quantized where it is made).
class Linear final : public Op {
 public:
  Linear(int index, const OpSpec& spec) : Op(index, spec) {
    for (size_t p = 0; p < spec.weights.size(); ++p) {
      parts_.push_back({spec.weights[p], spec.inputs[2 + 2 * p], spec.inputs[3 + 2 * p], spec.outputs[2 * p],
                        spec.outputs[2 * p + 1], spec.ints.at("gated")[p] != 0, spec.ints.at("columns")[p],
                        static_cast<Unary>(spec.ints.at("activation")[p]),
                        static_cast<float>(spec.floats.at("factor")[p])});
    }
  }

  size_t scratch_bytes(const Run& run) const override {
    const int64_t m = rows(run);
    const int64_t tile = m <= kSmallRows ? m * units_per_chunk(run) : row_tile(run) * prefill_units(run);
    bool needed = false;
    for (const Part& p : parts_) needed = needed || p.gated || p.y < 0;
    return needed ? static_cast<size_t>(tile * kUnit * 2) * sizeof(float) : 0;
  }

  int64_t begin(Run& run, int) const override {
    const int64_t m = rows(run);
    if (m == 0) return 0;
    const bool small = m <= kSmallRows;
    const int64_t height = small ? m : row_tile(run), units = small ? units_per_chunk(run) : prefill_units(run);
    std::vector<int64_t>& s = state(run);
    s.assign({height, units, (m + height - 1) / height});
    return column_tiles(units) * s[2];
  }

  void work(Run& run, int, int64_t chunk, int thread) const override {
    const std::vector<int64_t>& s = state(run);
    // A thread's share is some row tiles where these can be divided; in it, neighbouring chunks use the same weights.
    const int64_t rows_each = s[2] % run.threads == 0 ? s[2] / run.threads : s[2],
                  share = rows_each * column_tiles(s[1]);
    const int64_t row = (chunk / share * rows_each + chunk % share % rows_each) * s[0];
    int64_t tile = chunk % share / rows_each;
    for (const Part& p : parts_) {
      const int64_t tiles = (units_of(p) + s[1] - 1) / s[1];
      if (tile < tiles) {
        const int64_t column = tile * s[1] * kUnit;
        run_tile(run, p, row, std::min(s[0], rows(run) - row), column, std::min(column + s[1] * kUnit, p.columns),
                 thread);
        return;
      }
      tile -= tiles;
    }
  }

 private:
  struct Part {
    int weight, bias, residual, y, q;
    bool gated;
    int64_t columns;
    Unary activation;
    float factor;
  };

  static int64_t units_of(const Part& p) { return (p.columns + kUnit - 1) / kUnit; }

  int64_t rows(const Run& run) const { return has_in(0) ? in(run, 0).rows() : in(run, 1).rows(); }

  int64_t column_tiles(int64_t units) const {
    int64_t tiles = 0;
    for (const Part& p : parts_) tiles += (units_of(p) + units - 1) / units;
    return tiles;
  }

  // A chunk ends where a wide block of its outputs does.
  int64_t units_multiple(const Run& run) const {
    int64_t span = kUnit;
    for (const Part& p : parts_) {
      if (p.q >= 0) span = std::max(span, run.tensors[p.q].span());
    }
    return span / kUnit;
  }
  int64_t prefill_units(const Run& run) const { return round_up(kPrefillUnits, units_multiple(run)); }

  // Prefill: as many rows as leave enough chunks, for weights are unpacked once a chunk, and as many tiles for each
  // thread.
  int64_t row_tile(const Run& run) const {
    const int64_t m = rows(run), wanted = run.threads == 1 ? 1 : run.threads * kChunksPerThread;
    int64_t height = kRowTile;
    while (height > kLeastRowTile && column_tiles(prefill_units(run)) * ((m + height - 1) / height) < wanted)
      height /= 2;
    const int64_t tiles = round_up((m + height - 1) / height, run.threads), even = round_up((m + tiles - 1) / tiles, 8);
    return std::min(m, even >= kLeastRowTile ? even : height);
  }

  // Decoding: about kChunksPerThread chunks a thread.
  int64_t units_per_chunk(const Run& run) const {
    int64_t units = 0;
    for (const Part& p : parts_) units += units_of(p) * (p.gated ? 2 : 1);
    const int64_t chunks = run.threads == 1 ? 1 : run.threads * kChunksPerThread;
    return round_up(std::max<int64_t>(1, std::min<int64_t>((units + chunks - 1) / chunks, 64)), units_multiple(run));
  }

  void run_tile(const Run& run, const Part& p, int64_t row, int64_t m, int64_t column, int64_t column_end,
                int thread) const {
    const WeightSpec& w = run.spec->weights[p.weight];
    const int64_t columns = column_end - column;
    const bool direct = p.y >= 0 && !p.gated;
    float* tile =
        direct ? run.tensors[p.y].f32() + row * p.columns + column : reinterpret_cast<float*>(run.scratch[thread]);
    const int64_t spread = p.gated ? 2 : 1;
    const int64_t width = round_up(columns, kLanes) * spread;
    LinearArgs a{};
    a.w = run.weights[p.weight];
    a.n = w.n;
    a.k = w.k;
    a.m = m;
    a.prefetch = run.k->prefetch_for(m);
    a.y = tile;
    a.ldy = direct ? p.columns : width;
    if (w.type == WeightType::f32) {
      const Tensor& x = in(run, 1);
      a.x = x.f32() + row * w.k;
      a.ldx = w.k;
    } else {
      const Tensor& x = in(run, 0);
      const int64_t blocks = blocks_of(w.k);
      a.xq = x.xq() + row * blocks * kBlock;
      a.xb = x.xb() + row * blocks;
    }
    const int64_t panel = column / kLanes * spread;
    run.k->linear[static_cast<int>(w.type)](a, panel, panel + width / kLanes);

    const float* bias = p.bias >= 0 ? run.tensors[p.bias].f32() + column * spread : nullptr;
    float* y = tile;
    int64_t ldy = a.ldy;
    if (p.gated) {
      GatedArgs g{};
      g.y = tile;
      g.ldy = a.ldy;
      g.m = m;
      g.columns = columns;
      g.bias = bias;
      g.activation = p.activation;
      if (p.y >= 0) {
        y = run.tensors[p.y].f32() + row * p.columns + column;
        ldy = p.columns;
      }
      g.out = y;
      g.ldo = ldy;
      run.k->gated(g);
    } else if (bias || p.activation != Unary::identity || p.factor != 1.0f || p.residual >= 0) {
      EpilogueArgs e{};
      e.y = tile;
      e.ldy = ldy;
      e.m = m;
      e.columns = columns;
      e.bias = bias;
      e.activation = p.activation;
      e.scale = p.factor;
      if (p.residual >= 0) {
        e.residual = run.tensors[p.residual].f32() + row * p.columns + column;
        e.ldr = p.columns;
      }
      run.k->epilogue(e);
    }
    // y - column: the kernel addresses whole rows, this tile holds only the columns of its blocks.
    if (p.q >= 0) quantize_rows(run, y - column, ldy, run.tensors[p.q], row, m, column / kBlock, blocks_of(column_end));
  }

  std::vector<Part> parts_;
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

// The last `kept` rows of every segment of x [batch, sequence, ...]: a row is all that one token has, of any rank.
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
    run.k->rope(x.f32() + begin * ld, ld, end - begin, heads, d, spec_.integer("rotary"),
                spec_.integer("interleaved") != 0, cos.f32() + begin * ldc, in(run, 2).f32() + begin * ldc, ldc,
                out(run, 0).f32() + begin * ld, ld);
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
  state(run).assign({n, std::max<int64_t>(1, grain)});
  return (n + state(run)[1] - 1) / state(run)[1];
}

void ParallelOp::work(Run& run, int, int64_t chunk, int thread) const {
  const std::vector<int64_t>& s = state(run);
  run_units(run, chunk * s[1], std::min(s[0], (chunk + 1) * s[1]), thread);
}

std::unique_ptr<Op> make_row_op(int index, const OpSpec& spec) {
  if (spec.kind == "norm") return std::make_unique<Norm>(index, spec);
  if (spec.kind == "quantize") return std::make_unique<Quantize>(index, spec);
  if (spec.kind == "linear") return std::make_unique<Linear>(index, spec);
  if (spec.kind == "embed") return std::make_unique<Embed>(index, spec);
  if (spec.kind == "keep") return std::make_unique<Keep>(index, spec);
  if (spec.kind == "rope") return std::make_unique<Rope>(index, spec);
  return nullptr;
}

std::unique_ptr<Op> make_op(int index, const OpSpec& spec) {
  for (auto make : {make_row_op, make_attention_op, make_history_op, make_elementwise_op, make_pointwise_op,
                    make_shape_op, make_axis_op, make_math_op}) {
    if (auto op = make(index, spec)) return op;
  }
  throw std::logic_error("the program has an operation '" + spec.kind + "' that this build does not know");
}

}  // namespace edgeformer
