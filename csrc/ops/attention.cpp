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
  AttentionPlan p;
  p.prefill = is_prefill(run);
  for (int64_t i = 0; i < sequences(run); ++i) {
    p.kv_chunks = std::max(p.kv_chunks, (sequence(run, i).keys + kChunkTokens - 1) / kChunkTokens);
  }
  run.plans[index_] = p;
  if (!p.prefill) return 0;
  const int64_t rows = std::max(in(run, kQ).rows(), in(run, kK).rows());
  return (rows + kAppendRows - 1) / kAppendRows;
}

int64_t Attention::begin_attend(Run& run) const {
  AttentionPlan& p = plan<AttentionPlan>(run);
  const int64_t tasks = sequences(run) * kv_heads_;
  if (p.prefill) {
    const int64_t tiles = query_tiles(run);
    // Many short sequences: a task is small, so a thread takes several at a time.
    p.tasks_per_work = tiles > 1 ? 1 : std::max<int64_t>(1, tasks / (run.threads * 16));
    return (tasks + p.tasks_per_work - 1) / p.tasks_per_work * tiles;
  }
  if (p.kv_chunks <= 1 || run.threads == 1 || tasks >= run.threads * 4) return tasks;
  p.split = std::max<int64_t>(1, p.kv_chunks * tasks / (run.threads * 16));
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
    append_rows(run, chunk * kAppendRows, kAppendRows);
  } else if (phase == 1 && p.prefill) {
    const int64_t tiles = query_tiles(run), task = chunk / tiles * p.tasks_per_work;
    const int64_t end = std::min(task + p.tasks_per_work, sequences(run) * kv_heads_);
    // The last query tiles see the most keys: they go first, so that the threads end together.
    for (int64_t t = task; t < end; ++t) attend_tile(run, t, (tiles - 1 - chunk % tiles) * kQueryTile);
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
