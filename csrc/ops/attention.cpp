// The attention operation's numbers and its schedule; see attention.h.
#include "ops/attention.h"

#include <algorithm>

namespace edgeformer {

Attention::Attention(int index, const OpSpec& s)
    : Op(index, s),
      heads_(s.integer("heads")),
      kv_heads_(s.integer("kv_heads")),
      group_(heads_ / kv_heads_),
      dim_(s.integer("head_dim")),
      v_dim_(s.integer("value_dim")),
      layer_(s.integer("layer")),
      causal_(s.flag("causal")),
      bottom_right_(s.flag("at_end")),
      int8_(s.flag("integers")),
      window_(s.integer("window")),
      scale_(s.number("scale")),
      softcap_(s.number("softcap")),
      q_{kQ,
         kCosQ,
         kNormQ,
         heads_,
         s.integer("rotary"),
         s.flag("interleaved"),
         value_named(kNorms, "norm", s.name("q_norm")),
         s.number("q_eps")},
      k_{kK,
         kCosK,
         kNormK,
         kv_heads_,
         s.integer("rotary_k"),
         s.flag("interleaved_k"),
         value_named(kNorms, "norm", s.name("k_norm")),
         s.number("k_eps")} {}

int64_t Attention::begin(Run& run, int phase) const {
  if ((has_out(0) ? out(run, 0) : out(run, 1)).count == 0) return 0;
  if (phase == 0) return begin_append(run);
  if (phase == 1) return begin_attend(run);
  if (phase == 2) return begin_merge(run);
  if (has_out(1) && !quantizes_by_head(run)) {
    const Tensor& q = out(run, 1);
    quantize_rows(run, q, {attended(run), heads_ * v_dim_, 0, q.rows(), 0, blocks_of(q.columns())});
  }
  return 0;
}

int64_t Attention::begin_append(Run& run) const {
  fill_ranges(run);
  AttentionPlan p = new_plan(run);
  const int64_t rows = std::max(in(run, kQ).rows(), in(run, kK).rows());
  p.append_rows = std::clamp<int64_t>(rows / (run.threads * 4), 2, kAppendRows);
  run.plans[index_] = p;
  return p.prefill ? (rows + p.append_rows - 1) / p.append_rows : 0;
}

// Work is counted in query rows times KV chunks, of one KV head.
AttentionPlan Attention::new_plan(const Run& run) const {
  AttentionPlan p;
  p.prefill = is_prefill(run);
  int64_t total = 0, most = -1, rows = 1, tiles = 0;
  for (int64_t i = 0; i < sequences(run); ++i) {
    const Sequence s = sequence(run, i);
    const int64_t chunks = (s.keys + kChunkTokens - 1) / kChunkTokens, work = s.rows * chunks;
    p.kv_chunks = std::max(p.kv_chunks, chunks);
    total += work;
    tiles += (s.rows + kQueryTile - 1) / kQueryTile;
    if (work > most) {
      most = work;
      rows = s.rows;
      p.first = i;
    }
  }
  const int64_t tasks = sequences(run) * kv_heads_;
  if (p.prefill) {
    // Fewer rows of tokens are still a whole pass of the kernel, which takes the heads of a group as rows.
    p.tile = tiles * kv_heads_ < run.threads * 8 ? std::max<int64_t>(1, kQueryTile / group_) : kQueryTile;
    p.tiles = (max_rows(run) + p.tile - 1) / p.tile;
    // Many short sequences: a task is small, so a thread takes several at a time.
    p.tasks_per_work = p.tiles > 1 ? 1 : std::max<int64_t>(1, tasks / (run.threads * 16));
  } else if (p.kv_chunks > 1 && run.threads > 1 &&
             (tasks < run.threads * 4 || most * run.threads * 2 > total * kv_heads_)) {
    p.split = std::max<int64_t>(1, total * kv_heads_ / (run.threads * 16 * std::max<int64_t>(1, rows)));
  }
  return p;
}

int64_t Attention::begin_attend(Run& run) const {
  const AttentionPlan& p = plan<AttentionPlan>(run);
  const int64_t tasks = sequences(run) * kv_heads_;
  if (p.prefill) return (tasks + p.tasks_per_work - 1) / p.tasks_per_work * p.tiles;
  if (!p.split) return tasks;
  const size_t floats = static_cast<size_t>(total_rows(run) * heads_ * p.kv_chunks * partial_row(run));
  if (run.partials.size() < floats) run.partials.resize(floats + floats / 2);
  return tasks * ((p.kv_chunks + p.split - 1) / p.split);
}

int64_t Attention::begin_merge(Run& run) const {
  const AttentionPlan& p = plan<AttentionPlan>(run);
  if (!p.split) return 0;
  const int64_t tasks = sequences(run) * kv_heads_;
  if (total_rows(run) * heads_ * p.kv_chunks * v_dim_ > kSerialMerge) return tasks;
  for (int64_t t = 0; t < tasks; ++t) merge(run, t);
  return 0;
}

void Attention::work(Run& run, int phase, int64_t chunk, int thread) const {
  const AttentionPlan& p = plan<AttentionPlan>(run);
  if (phase == 0) {
    append_rows(run, chunk * p.append_rows, p.append_rows);
  } else if (phase == 1 && p.prefill) {
    const int64_t task = chunk / p.tiles * p.tasks_per_work;
    const int64_t end = std::min(task + p.tasks_per_work, sequences(run) * kv_heads_);
    // The last query tiles see the most keys: they go first, too.
    for (int64_t t = task; t < end; ++t) attend_tile(run, t, p.tiles - 1 - chunk % p.tiles);
  } else if (phase == 1) {
    decode(run, chunk, thread);
  } else {
    merge(run, chunk);
  }
}

std::unique_ptr<Op> make_attention_op(int index, const OpSpec& spec) {
  if (spec.kind == "attend") return std::make_unique<Attention>(index, spec);
  return nullptr;
}

}  // namespace edgeformer
