// Operations that move elements: expand, tile, transpose, slice, concat, gather, pad, trilu, and those without
// inputs: range, fill, sizes.
#include <algorithm>
#include <cstring>
#include <string>

#include "ops/ops.h"
#include "ops/strided.h"

namespace edgeformer {
namespace {

int64_t width(const Tensor& t) { return t.dtype == DType::boolean ? 1 : t.dtype == DType::i64 ? 8 : 4; }

// Copies the rows [begin, end) of y from x + offset, walking x by `strides` (elements, may be negative).
void copy_strided(const Tensor& x, int64_t offset, const Strides& strides, const Tensor& y, int64_t begin,
                  int64_t end) {
  const int64_t n = y.columns(), step = y.rank ? strides[y.rank - 1] : 0, w = width(y);
  const uint8_t* from = static_cast<const uint8_t*>(x.data);
  uint8_t* to = static_cast<uint8_t*>(y.data);
  for_rows<1>(y, {strides}, begin, end, [&](int64_t row, const std::array<int64_t, 1>& at) {
    const uint8_t* source = from + (offset + at[0]) * w;
    uint8_t* target = to + row * n * w;
    if (step == 1) {
      std::memcpy(target, source, n * w);
    } else if (w == 4) {
      for (int64_t i = 0; i < n; ++i) std::memcpy(target + i * 4, source + i * step * 4, 4);
    } else if (w == 8) {
      for (int64_t i = 0; i < n; ++i) std::memcpy(target + i * 8, source + i * step * 8, 8);
    } else {
      for (int64_t i = 0; i < n; ++i) target[i] = source[i * step];
    }
  });
}

// An operation that copies its input by strides: the subclass gives the offset and the strides.
class CopyOp : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).rows(); }
  int64_t unit_cost(const Run& run) const override { return out(run, 0).columns(); }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    int64_t offset = 0;
    const Strides strides = walk(run, &offset);
    copy_strided(in(run, 0), offset, strides, out(run, 0), begin, end);
  }
  virtual Strides walk(const Run& run, int64_t* offset) const = 0;
};

class Expand final : public CopyOp {
 public:
  using CopyOp::CopyOp;
  int64_t begin(Run& run, int phase) const override {
    if (!broadcasts(in(run, 0), out(run, 0))) {
      throw InputProblem("Expand that makes " + run.spec->slots[spec_.outputs[0]].name + ": sizes do not fit");
    }
    return CopyOp::begin(run, phase);
  }

 protected:
  Strides walk(const Run& run, int64_t*) const override { return broadcast_strides(in(run, 0), out(run, 0)); }
};

class Transpose final : public CopyOp {
 public:
  using CopyOp::CopyOp;

 protected:
  Strides walk(const Run& run, int64_t*) const override {
    const Strides own = contiguous(in(run, 0));
    Strides s{};
    const std::vector<int64_t>& perm = spec_.ints.at("perm");
    for (size_t i = 0; i < perm.size(); ++i) s[i] = own[perm[i]];
    return s;
  }
};

class Slice final : public CopyOp {
 public:
  using CopyOp::CopyOp;

 protected:
  Strides walk(const Run& run, int64_t* offset) const override {
    const Tensor& x = in(run, 0);
    Strides s = contiguous(x);
    const std::vector<int64_t>&axes = spec_.ints.at("axes"), &steps = spec_.ints.at("steps");
    const std::vector<int>& starts = spec_.sizes.at("starts");
    for (size_t i = 0; i < axes.size(); ++i) {
      const int64_t axis = axes[i], size = x.shape[axis], count = out(run, 0).shape[axis];
      int64_t start = run.sizes[starts[i]];
      if (start < 0) start += size;
      start = std::min(std::max<int64_t>(start, 0), steps[i] < 0 ? size - 1 : size);
      const int64_t last = start + (count - 1) * steps[i];
      if (count < 0 || (count > 0 && (last < 0 || last >= size))) {
        throw InputProblem("Slice that makes " + run.spec->slots[spec_.outputs[0]].name + " goes past its input");
      }
      *offset += start * s[axis];
      s[axis] *= steps[i];
    }
    return s;
  }
};

class Tile final : public ParallelOp {
 public:
  using ParallelOp::ParallelOp;

 protected:
  int64_t units(const Run& run) const override { return out(run, 0).count; }
  void run_units(Run& run, int64_t begin, int64_t end, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    const Strides own = contiguous(x), across = contiguous(y);
    const int64_t w = width(y);
    for (int64_t i = begin; i < end; ++i) {
      int64_t at = 0;
      for (int axis = 0; axis < y.rank; ++axis) at += i / across[axis] % y.shape[axis] % x.shape[axis] * own[axis];
      std::memcpy(static_cast<uint8_t*>(y.data) + i * w, static_cast<uint8_t*>(x.data) + at * w, w);
    }
  }
};

class Concat final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor& y = out(run, 0);
    const int64_t axis = spec_.integer("axis"), w = width(y);
    int64_t outer = 1, inner = 1, total = 0;
    for (int i = 0; i < axis; ++i) outer *= y.shape[i];
    for (int i = axis + 1; i < y.rank; ++i) inner *= y.shape[i];
    for (size_t k = 0; k < spec_.inputs.size(); ++k) {
      const Tensor& x = in(run, k);
      if (x.count != outer * inner * x.shape[axis]) throw InputProblem("Concat of tensors whose sizes do not fit");
      const int64_t part = x.shape[axis] * inner * w;
      for (int64_t o = 0; o < outer && part; ++o) {
        std::memcpy(static_cast<uint8_t*>(y.data) + (o * y.shape[axis] + total) * inner * w,
                    static_cast<uint8_t*>(x.data) + o * part, part);
      }
      total += x.shape[axis];
    }
    if (total != y.shape[axis]) throw InputProblem("Concat: the parts do not add up");
    return 0;
  }
};

int64_t checked_index(const Run& run, const OpSpec& spec, int64_t i, int64_t size) {
  if (i < 0) i += size;
  if (i < 0 || i >= size) {
    throw InputProblem("an index in " + run.spec->slots[spec.inputs[1]].name + " is " + std::to_string(i) +
                       ", expected 0 to " + std::to_string(size - 1));
  }
  return i;
}

class Gather final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor &x = in(run, 0), &ids = in(run, 1), &y = out(run, 0);
    const int64_t axis = spec_.integer("axis"), size = x.shape[axis], w = width(x);
    int64_t outer = 1, inner = w;
    for (int i = 0; i < axis; ++i) outer *= x.shape[i];
    for (int i = axis + 1; i < x.rank; ++i) inner *= x.shape[i];
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t i = 0; i < ids.count; ++i) {
        const int64_t id = checked_index(run, spec_, ids.i64()[i], size);
        std::memcpy(static_cast<uint8_t*>(y.data) + (o * ids.count + i) * inner,
                    static_cast<uint8_t*>(x.data) + (o * size + id) * inner, inner);
      }
    }
    return 0;
  }
};

class GatherElements final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor &x = in(run, 0), &ids = in(run, 1), &y = out(run, 0);
    const int64_t axis = spec_.integer("axis"), w = width(x);
    const Strides own = contiguous(x), across = contiguous(y);
    for (int64_t i = 0; i < y.count; ++i) {
      int64_t at = 0;
      for (int a = 0; a < y.rank; ++a) {
        const int64_t index =
            a == axis ? checked_index(run, spec_, ids.i64()[i], x.shape[a]) : i / across[a] % y.shape[a];
        at += index * own[a];
      }
      std::memcpy(static_cast<uint8_t*>(y.data) + i * w, static_cast<uint8_t*>(x.data) + at * w, w);
    }
    return 0;
  }
};

class GatherNd final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor &x = in(run, 0), &ids = in(run, 1), &y = out(run, 0);
    const int64_t batch = spec_.integer("batch"), depth = ids.columns();
    const Strides own = contiguous(x);
    int64_t outer = 1, inner = width(x);
    for (int i = 0; i < batch; ++i) outer *= x.shape[i];
    for (int i = static_cast<int>(batch + depth); i < x.rank; ++i) inner *= x.shape[i];
    const int64_t tuples = ids.count / depth, each = tuples / outer, step = x.count / outer;
    for (int64_t t = 0; t < tuples; ++t) {
      int64_t at = t / each * step;
      for (int64_t d = 0; d < depth; ++d) {
        at += checked_index(run, spec_, ids.i64()[t * depth + d], x.shape[batch + d]) * own[batch + d];
      }
      std::memcpy(static_cast<uint8_t*>(y.data) + t * inner, static_cast<uint8_t*>(x.data) + at * width(x), inner);
    }
    return 0;
  }
};

// A copy of x in which y[.., ids[i], ..] along one axis is replaced by (or joined with) the updates.
class ScatterElements final : public Op {
 public:
  ScatterElements(int index, const OpSpec& spec)
      : Op(index, spec), fn_(value_named(kScatters, "reduction", spec.name("fn"))) {}
  int64_t begin(Run& run, int) const override {
    const Tensor &x = in(run, 0), &ids = in(run, 1), &updates = in(run, 2), &y = out(run, 0);
    const int64_t axis = spec_.integer("axis"), w = width(x);
    if (y.count) std::memcpy(y.data, x.data, y.bytes());
    const Strides own = contiguous(y), across = contiguous(ids);
    for (int64_t i = 0; i < ids.count; ++i) {
      int64_t at = 0;
      for (int a = 0; a < ids.rank; ++a) {
        const int64_t index =
            a == axis ? checked_index(run, spec_, ids.i64()[i], y.shape[a]) : i / across[a] % ids.shape[a];
        at += index * own[a];
      }
      if (fn_ == Scatter::none) {
        std::memcpy(static_cast<uint8_t*>(y.data) + at * w, static_cast<uint8_t*>(updates.data) + i * w, w);
      } else if (y.dtype == DType::f32) {
        y.f32()[at] = fn_ == Scatter::add ? y.f32()[at] + updates.f32()[i] : y.f32()[at] * updates.f32()[i];
      } else if (y.dtype == DType::i64) {
        y.i64()[at] = fn_ == Scatter::add ? y.i64()[at] + updates.i64()[i] : y.i64()[at] * updates.i64()[i];
      } else {
        throw InputProblem("ScatterElements that adds bools");
      }
    }
    return 0;
  }

 private:
  const Scatter fn_;
};

class ScatterNd final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor &x = in(run, 0), &ids = in(run, 1), &updates = in(run, 2), &y = out(run, 0);
    if (y.count) std::memcpy(y.data, x.data, y.bytes());
    const int64_t depth = ids.columns();
    const Strides own = contiguous(y);
    int64_t inner = width(y);
    for (int i = static_cast<int>(depth); i < y.rank; ++i) inner *= y.shape[i];
    for (int64_t t = 0; t < ids.count / depth; ++t) {
      int64_t at = 0;
      for (int64_t d = 0; d < depth; ++d) {
        at += checked_index(run, spec_, ids.i64()[t * depth + d], y.shape[d]) * own[d];
      }
      std::memcpy(static_cast<uint8_t*>(y.data) + at * width(y), static_cast<uint8_t*>(updates.data) + t * inner,
                  inner);
    }
    return 0;
  }
};

class Pad final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    const std::vector<int64_t>& axes = spec_.ints.at("axes");
    const std::vector<int>& pads = spec_.sizes.at("pads");
    const int64_t w = width(y);
    fill(y, spec_.floats.at("value")[0]);
    // The part of x that is not cut off by negative pads, and where it goes.
    std::array<int64_t, kMaxRank> before{};
    for (size_t i = 0; i < axes.size(); ++i) before[axes[i]] = run.sizes[pads[i]];
    const Strides own = contiguous(x), across = contiguous(y);
    for (int64_t i = 0; i < x.count; ++i) {
      int64_t at = 0;
      bool inside = true;
      for (int a = 0; a < x.rank; ++a) {
        const int64_t index = i / own[a] % x.shape[a] + before[a];
        inside = inside && index >= 0 && index < y.shape[a];
        at += index * across[a];
      }
      if (inside) std::memcpy(static_cast<uint8_t*>(y.data) + at * w, static_cast<uint8_t*>(x.data) + i * w, w);
    }
    return 0;
  }
  static void fill(const Tensor& y, double v) {
    if (y.dtype == DType::f32) {
      std::fill_n(y.f32(), y.count, static_cast<float>(v));
    } else if (y.dtype == DType::i64) {
      std::fill_n(y.i64(), y.count, static_cast<int64_t>(v));
    } else {
      std::fill_n(y.boolean(), y.count, v != 0);
    }
  }
};

class Fill final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    Pad::fill(out(run, 0), spec_.floats.at("value")[0]);
    return 0;
  }
};

class Range final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor& y = out(run, 0);
    const int64_t start = run.sizes[spec_.sizes.at("start")[0]], step = spec_.integer("step");
    for (int64_t i = 0; i < y.count; ++i) y.i64()[i] = start + i * step;
    return 0;
  }
};

class Sizes final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const std::vector<int>& sizes = spec_.sizes.at("sizes");
    const Tensor& y = out(run, 0);
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (y.dtype == DType::boolean) {
        y.boolean()[i] = run.sizes[sizes[i]] != 0;
      } else {
        y.i64()[i] = run.sizes[sizes[i]];
      }
    }
    return 0;
  }
};

class Trilu final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    const int64_t k = run.sizes[spec_.sizes.at("start")[0]], w = width(y);
    const bool upper = spec_.integer("upper") != 0;
    const int64_t columns = y.columns(), rows = y.shape[y.rank - 2];
    for (int64_t i = 0; i < y.count; ++i) {
      const int64_t c = i % columns, r = i / columns % rows;
      const bool kept = upper ? c - r >= k : c - r <= k;
      uint8_t* to = static_cast<uint8_t*>(y.data) + i * w;
      if (kept) {
        std::memcpy(to, static_cast<uint8_t*>(x.data) + i * w, w);
      } else {
        std::memset(to, 0, w);
      }
    }
    return 0;
  }
};

}  // namespace

std::unique_ptr<Op> make_shape_op(int index, const OpSpec& spec) {
  if (spec.kind == "expand") return std::make_unique<Expand>(index, spec);
  if (spec.kind == "transpose") return std::make_unique<Transpose>(index, spec);
  if (spec.kind == "slice") return std::make_unique<Slice>(index, spec);
  if (spec.kind == "tile") return std::make_unique<Tile>(index, spec);
  if (spec.kind == "concat") return std::make_unique<Concat>(index, spec);
  if (spec.kind == "gather") return std::make_unique<Gather>(index, spec);
  if (spec.kind == "gather_elements") return std::make_unique<GatherElements>(index, spec);
  if (spec.kind == "gather_nd") return std::make_unique<GatherNd>(index, spec);
  if (spec.kind == "scatter_elements") return std::make_unique<ScatterElements>(index, spec);
  if (spec.kind == "scatter_nd") return std::make_unique<ScatterNd>(index, spec);
  if (spec.kind == "pad") return std::make_unique<Pad>(index, spec);
  if (spec.kind == "fill") return std::make_unique<Fill>(index, spec);
  if (spec.kind == "range") return std::make_unique<Range>(index, spec);
  if (spec.kind == "sizes") return std::make_unique<Sizes>(index, spec);
  if (spec.kind == "trilu") return std::make_unique<Trilu>(index, spec);
  return nullptr;
}

}  // namespace edgeformer
