// Products with packed weights: bias, activation, gate, residual and quantization of the result included.
#include <algorithm>

#include "ops/ops.h"

namespace edgeformer {
namespace {

constexpr int64_t kRowTile = 256;  // most rows of activations that one chunk of a prefill works on
constexpr int64_t kLeastRowTile = 32;
constexpr int64_t kChunksPerThread = 6;  // at least, so that a thread that was interrupted delays the others little
constexpr int64_t kUnit = 32;            // output columns of the smallest chunk: one activation block
constexpr int64_t kPrefillUnits = 2;

// One or several products with the same input:
//   y_p = activation(x W_p^T + bias) * factor + residual,  or  activation(x G_p^T + bias) * (x W_p^T + bias)
// A chunk is a tile of rows and of output columns (a multiple of 32, so that it can be quantized where it is made).
class Linear final : public Op {
 public:
  Linear(int index, const OpSpec& spec) : Op(index, spec) {
    for (size_t i = 0; i < spec.weights.size(); ++i) {
      Part p{};
      p.weight = spec.weights[i];
      p.bias = spec.inputs[2 + 2 * i];
      p.residual = spec.inputs[3 + 2 * i];
      p.y = spec.outputs[2 * i];
      p.q = spec.outputs[2 * i + 1];
      p.gated = spec.ints.at("gated")[i] != 0;
      p.columns = spec.ints.at("columns")[i];
      p.activation = value_named(kUnaryTable, "activation", spec.names.at("activation")[i]);
      p.factor = static_cast<float>(spec.floats.at("factor")[i]);
      parts_.push_back(p);
    }
  }

  size_t scratch_bytes(const Run& run) const override {
    const LinearPlan plan = division(run);
    bool needed = false;
    for (const Part& p : parts_) needed = needed || p.gated || p.y < 0;
    return needed ? static_cast<size_t>(plan.row_tile * plan.units * kUnit * 2) * sizeof(float) : 0;
  }

  int64_t begin(Run& run, int) const override {
    if (rows(run) == 0) return 0;
    const LinearPlan plan = division(run);
    run.plans[index_] = plan;
    return column_tiles(plan.units) * plan.row_tiles;
  }

  void work(Run& run, int, int64_t chunk, int thread) const override {
    const LinearPlan& s = plan<LinearPlan>(run);
    // A thread's range is some row tiles if these can be divided; in it, neighbouring chunks use the same weights.
    const int64_t rows_each = s.row_tiles % run.threads == 0 ? s.row_tiles / run.threads : s.row_tiles;
    const int64_t range = rows_each * column_tiles(s.units);
    const int64_t row = (chunk / range * rows_each + chunk % range % rows_each) * s.row_tile;
    int64_t tile = chunk % range / rows_each;
    for (const Part& p : parts_) {
      const int64_t tiles = (units_of(p) + s.units - 1) / s.units;
      if (tile < tiles) {
        const int64_t column = tile * s.units * kUnit;
        run_tile(run, p,
                 {row, std::min(s.row_tile, rows(run) - row), column, std::min(column + s.units * kUnit, p.columns)},
                 thread);
        return;
      }
      tile -= tiles;
    }
  }

 private:
  struct Part {
    int weight;
    int bias, residual, y, q;  // slots: y as floats, q quantized; -1 for none
    bool gated;
    int64_t columns;
    Unary activation;
    float factor;
  };
  struct Tile {
    int64_t row, rows, column, column_end;
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

  static int64_t wanted_chunks(const Run& run) { return run.threads == 1 ? 1 : run.threads * kChunksPerThread; }

  // Prefill: as many rows as leave enough chunks, for weights are unpacked once a chunk, and as many tiles for each
  // thread.
  LinearPlan division(const Run& run) const {
    const int64_t m = rows(run), least = units_multiple(run), units = round_up(kPrefillUnits, least);
    if (m <= kSmallRows) return {m, units_per_chunk(run), 1};
    const int64_t wanted = wanted_chunks(run);
    int64_t height = kRowTile;
    while (height > kLeastRowTile && column_tiles(units) * ((m + height - 1) / height) < wanted) height /= 2;
    const int64_t tiles = round_up((m + height - 1) / height, run.threads), even = round_up((m + tiles - 1) / tiles, 8);
    // Each thread's part would be so small that it goes through the packed weights, all of them in every thread. All rows
    // together, a tile of unpacked weights for each, take less.
    if (m > kFewRows && m <= kRowTile && even <= kFewRows && column_tiles(least) >= wanted) return {m, least, 1};
    height = std::min(m, even >= kLeastRowTile ? even : height);
    return {height, units, (m + height - 1) / height};
  }

  // Decoding: about kChunksPerThread chunks a thread.
  int64_t units_per_chunk(const Run& run) const {
    int64_t units = 0;
    for (const Part& p : parts_) units += units_of(p) * (p.gated ? 2 : 1);
    const int64_t chunks = wanted_chunks(run);
    return round_up(std::max<int64_t>(1, std::min<int64_t>((units + chunks - 1) / chunks, 64)), units_multiple(run));
  }

  void run_tile(const Run& run, const Part& p, const Tile& t, int thread) const {
    const WeightSpec& w = run.spec->weights[p.weight];
    const int64_t row = t.row, m = t.rows, column = t.column, columns = t.column_end - column;
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
    if (p.q >= 0) {
      quantize_rows(run, run.tensors[p.q], {y - column, ldy, row, m, column / kBlock, blocks_of(t.column_end)});
    }
  }

  std::vector<Part> parts_;
};

}  // namespace

std::unique_ptr<Op> make_linear_op(int index, const OpSpec& spec) {
  if (spec.kind == "linear") return std::make_unique<Linear>(index, spec);
  return nullptr;
}

}  // namespace edgeformer
