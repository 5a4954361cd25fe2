// Norm and rotation of heads, and append to the KV cache; see attention.h.
#include <algorithm>
#include <cstring>

#include "ops/attention.h"

namespace edgeformer {

// y = rope(norm(x)) of some heads of some rows; y has the layout of x, and points to head 0 of the first row.
void Attention::rotate(const Run& run, const Side& side, const HeadRows& part, float* y) const {
  const int64_t ld = side.heads * dim_, offset = part.head * dim_, m = part.rows;
  const float* x = in(run, side.x).f32() + part.row * ld + offset;
  y += offset;
  if (side.norm != NormKind::none) {
    const float* weight = has_in(side.norm_weight) ? in(run, side.norm_weight).f32() : nullptr;
    const float* bias = has_in(side.norm_weight + 1) ? in(run, side.norm_weight + 1).f32() : nullptr;
    const auto norm = side.norm == NormKind::rms ? run.k->rms_norm : run.k->layer_norm;
    for (int64_t h = 0; h < part.heads; ++h) {
      norm({.x = x + h * dim_,
            .ldx = ld,
            .m = m,
            .n = dim_,
            .weight = weight,
            .bias = bias,
            .eps = side.eps,
            .y = y + h * dim_,
            .ldy = ld});
    }
    x = y;
  }
  if (side.rotary) {
    const Tensor &cos = in(run, side.cos), &sin = in(run, side.cos + 1);
    const int64_t ldc = cos.columns();
    run.k->rope({.x = x,
                 .ldx = ld,
                 .m = m,
                 .heads = part.heads,
                 .head_dim = dim_,
                 .rotary = side.rotary,
                 .interleaved = side.interleaved,
                 .cos = cos.f32() + part.row * ldc,
                 .sin = sin.f32() + part.row * ldc,
                 .ldc = ldc,
                 .y = y,
                 .ldy = ld});
  } else if (side.norm == NormKind::none) {
    for (int64_t r = 0; r < m; ++r) std::memcpy(y + r * ld, x + r * ld, part.heads * dim_ * sizeof(float));
  }
}

// Prefetches the lines that a token's key and value are written to: those of a key are one for every 4 columns.
void Attention::prefetch_place(const Run& run, const Sequence& s, int64_t token, int64_t kv_head) const {
  const KvLayout l = kv_layout(run);
  if (l.type != KvType::int8) return;
  const int64_t at = token % kChunkTokens, tile = round_up(l.head_dim, 4) * kLanes, pair = 2 * l.value_stride();
  const uint8_t* head = s.chunks[token / kChunkTokens] + kv_head * l.head_bytes();
  prefetch_bytes<1>(head + at / kLanes * tile, tile);
  prefetch_bytes<1>(head + l.values() + at / 2 * pair, pair);
  prefetch_bytes<1>(head + l.key_scales() + at * 4, 4);
  prefetch_bytes<1>(head + l.value_scales() + at * 4, 4);
}

void Attention::append(const Run& run, const Sequence& s, const NewTokens& t) const {
  KvAppendArgs a{};
  a.layout = kv_layout(run);
  a.chunks = s.chunks;
  a.position = s.past + t.first;
  a.tokens = t.tokens;
  a.head_begin = t.head_begin;
  a.head_end = t.head_end;
  a.k = t.k;
  a.ldk = kv_heads_ * dim_;
  a.v = in(run, kV).f32() + (s.k_row + t.first) * kv_heads_ * v_dim_;
  a.ldv = kv_heads_ * v_dim_;
  run.k->kv_append(a);
}

// Prefill: rotates rows [row, row + rows) of queries and keys, and appends these keys and their values.
void Attention::append_rows(const Run& run, int64_t row, int64_t rows) const {
  const Layout at = layout(run);
  const int64_t q_rows = std::min(rows, in(run, kQ).rows() - row);
  if (q_rows > 0 && q_.changes()) {
    rotate(run, q_, {row, q_rows, 0, heads_}, temp_floats(run, at.q) + row * heads_ * dim_);
  }
  const int64_t k_end = std::min(row + rows, in(run, kK).rows());
  const int64_t each = by_segments(run) ? 0 : in(run, kK).shape[1];  // keys of a sequence, if all have as many
  for (int64_t i = each ? row / each : 0; i < sequences(run); ++i) {
    const Sequence s = sequence(run, i);
    if (s.k_row >= k_end) break;
    // Two tokens from an even position on share bytes of the cache: one task appends both, that of the first one's row.
    const auto whole = [&s](int64_t r) { return r <= s.k_row ? s.k_row : r + (s.past + r - s.k_row) % 2; };
    const int64_t first = whole(row), last = std::min(whole(k_end), s.k_row + s.k_rows);
    if (first >= last) continue;
    const float* keys = in(run, kK).f32() + first * kv_heads_ * dim_;
    if (k_.changes()) {
      float* rotated = temp_floats(run, at.k) + first * kv_heads_ * dim_;
      rotate(run, k_, {first, last - first, 0, kv_heads_}, rotated);
      keys = rotated;
    }
    append(run, s, {first - s.k_row, last - first, 0, kv_heads_, keys});
  }
}

}  // namespace edgeformer
