// A tile of a prefill, a task of a decode step, and the merge of split sequences; see attention.h.
#include <algorithm>

#include "ops/attention.h"

namespace edgeformer {

// The kernel's arguments for all rows of a sequence; q: head 0 of its first row.
AttentionArgs Attention::attention_args(const Run& run, const Sequence& s, const float* q) const {
  const Layout at = layout(run);
  AttentionArgs a{};
  a.layout = kv_layout(run);
  a.chunks = s.chunks;
  a.group = group_;
  a.tokens = s.rows;
  a.q = q;
  a.ldq = heads_ * dim_;
  a.begin = reinterpret_cast<const int32_t*>(temp(run) + at.begin) + s.row;
  a.end = reinterpret_cast<const int32_t*>(temp(run) + at.end) + s.row;
  a.scale = scale_;
  a.softcap = softcap_;
  if (has_in(kMask)) {
    const Tensor& m = in(run, kMask);  // [batch or 1, heads or 1, queries, keys]
    a.mask_token = m.shape[3];
    a.mask_head = m.shape[1] == 1 ? 0 : m.shape[2] * m.shape[3];
    a.mask = m.f32() + (m.shape[0] == 1 ? 0 : s.mask_row * m.shape[1] * m.shape[2] * m.shape[3]);
  }
  a.out = attended(run) + s.row * heads_ * v_dim_;
  a.ldo = heads_ * v_dim_;
  return a;
}

// The first chunk of keys that the sequence's first row sees; null if there is none.
const uint8_t* Attention::first_keys(const Run& run, const Sequence& s, int64_t kv_head) const {
  if (s.rows == 0 || s.keys == 0) return nullptr;
  const auto* begin = reinterpret_cast<const int32_t*>(temp(run) + layout(run).begin);
  const uint8_t* chunk = s.chunks[std::min<int64_t>(begin[s.row], s.keys - 1) / kChunkTokens];
  return chunk ? chunk + kv_head * kv_layout(run).head_bytes() : nullptr;
}

// Rows [first, first + rows) of the sequence, if the columns of one KV head's group are whole blocks.
void Attention::quantize_head(const Run& run, const Sequence& s, int64_t kv_head, int64_t first, int64_t rows) const {
  if (!has_out(1) || !quantizes_by_head(run)) return;
  const Tensor& q = out(run, 1);
  const int64_t n = q.columns(), row = s.row + first, blocks = group_ * v_dim_ / kBlock;
  quantize_rows(run, q, {attended(run) + row * n, n, row, rows, kv_head * blocks, (kv_head + 1) * blocks});
}

// Prefill: a tile of rows of task (sequence, KV head).
void Attention::attend_tile(Run& run, int64_t task, int64_t tile) const {
  const AttentionPlan& p = plan<AttentionPlan>(run);
  const Sequence s = sequence(run, (task / kv_heads_ + p.first) % sequences(run));
  const int64_t kv_head = task % kv_heads_, first = tile * p.tile, last = std::min(first + p.tile, s.rows);
  if (first >= last) return;
  const float* q = q_.changes() ? temp_floats(run, layout(run).q) : in(run, kQ).f32();
  run.k->attention(attention_args(run, s, q + s.row * heads_ * dim_), kv_head, first, last);
  quantize_head(run, s, kv_head, first, last - first);
}

void Attention::decode(Run& run, int64_t chunk, int thread) const {
  const AttentionPlan& p = plan<AttentionPlan>(run);
  const int64_t parts = p.split ? (p.kv_chunks + p.split - 1) / p.split : 1;
  const int64_t task = chunk / parts, kv_head = task % kv_heads_;
  const Sequence s = sequence(run, (task / kv_heads_ + p.first) % sequences(run));
  const int64_t chunks = (s.keys + kChunkTokens - 1) / kChunkTokens;
  const int64_t c_begin = p.split ? chunk % parts * p.split : 0;
  const int64_t c_end = p.split ? std::min(c_begin + p.split, chunks) : chunks;
  if (s.rows == 0 || (c_begin >= c_end && p.split)) return;

  // The new tokens of this part: only this task reads them.
  const int64_t first = std::max<int64_t>(0, c_begin * kChunkTokens - s.past);
  const int64_t last = std::min(s.rows, c_end * kChunkTokens - s.past);
  if (first < last) prefetch_place(run, s, s.past + first, kv_head);

  float* scratch = reinterpret_cast<float*>(run.scratch[thread]);
  const float* q = in(run, kQ).f32() + s.row * heads_ * dim_;
  if (q_.changes()) {
    rotate(run, q_, {s.row, s.rows, kv_head * group_, group_}, scratch);
    q = scratch;
  }
  if (first < last) {
    const float* k = in(run, kK).f32() + (s.row + first) * kv_heads_ * dim_;
    if (k_.changes()) {
      float* rotated = scratch + s.rows * heads_ * dim_;
      rotate(run, k_, {s.row + first, last - first, kv_head, 1}, rotated);
      k = rotated;
    }
    append(run, s, {first, last - first, kv_head, kv_head + 1, k});
  }
  AttentionArgs a = attention_args(run, s, q);
  if (!p.split) {
    const bool is_last = kv_head + 1 == kv_heads_;
    const Sequence& next = is_last ? sequence(run, (task / kv_heads_ + 1 + p.first) % sequences(run)) : s;
    a.ahead = first_keys(run, next, is_last ? 0 : kv_head + 1);
    run.k->attention(a, kv_head, 0, s.rows);
    quantize_head(run, s, kv_head, 0, s.rows);
    return;
  }
  for (int64_t c = c_begin; c < c_end; ++c) {
    a.ahead = c + 1 < chunks ? s.chunks[c + 1] + kv_head * a.layout.head_bytes() : nullptr;
    run.k->attention_partial(a, kv_head, 0, s.rows, c, partial(run, s, kv_head, c));
  }
}

// Partials: [sequence rows][KV head][chunk][rows * group][partial_row]
float* Attention::partial(Run& run, const Sequence& s, int64_t kv_head, int64_t chunk) const {
  const int64_t row = partial_row(run), chunks = plan<AttentionPlan>(run).kv_chunks;
  return run.partials.data() + ((s.row * kv_heads_ + kv_head * s.rows) * chunks + chunk * s.rows) * group_ * row;
}

// Joins the partials of task (sequence, KV head), in the order of the chunks.
void Attention::merge(Run& run, int64_t task) const {
  const Sequence s = sequence(run, task / kv_heads_);
  const int64_t kv_head = task % kv_heads_;
  if (s.rows == 0) return;
  const int64_t chunks = (s.keys + kChunkTokens - 1) / kChunkTokens;
  run.k->attention_merge(
      attention_args(run, s, nullptr), kv_head, 0, s.rows,
      {.partial = partial(run, s, kv_head, 0), .chunks = chunks, .stride = s.rows * group_ * partial_row(run)});
  quantize_head(run, s, kv_head, 0, s.rows);
}

}  // namespace edgeformer
