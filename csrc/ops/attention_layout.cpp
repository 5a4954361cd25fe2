// The sequences of a run and the attention operation's memory; see attention.h.
#include <algorithm>

#include "ops/attention.h"

namespace edgeformer {

size_t Attention::temp_bytes(const Run& run) const { return layout(run).total; }

// Decode: the rotated queries and keys of one sequence.
size_t Attention::scratch_bytes(const Run& run) const {
  return static_cast<size_t>(round_up(std::min(max_rows(run), kSmallRows) * (heads_ + kv_heads_) * dim_, 64)) *
         sizeof(float);
}

// Whether sequences are the run's segments (rows of several states together, or a cache), else q's first axis.
bool Attention::by_segments(const Run& run) const { return layer_ >= 0 || run.spec->row_local; }

int64_t Attention::sequences(const Run& run) const {
  return by_segments(run) ? static_cast<int64_t>(run.segments.size()) : in(run, kQ).shape[0];
}

int64_t Attention::max_rows(const Run& run) const {
  if (!by_segments(run)) return in(run, kQ).shape[1];
  int64_t most = 0;
  for (const Segment& s : run.segments) most = std::max(most, s.rows);
  return most;
}

Attention::Sequence Attention::sequence(const Run& run, int64_t i) const {
  Sequence s{};
  s.mask_row = i;
  if (by_segments(run)) {
    const Segment& g = run.segments[i];
    s.row = s.k_row = g.row;
    s.rows = s.k_rows = g.rows;
    s.past = layer_ >= 0 ? g.past : 0;
  } else {
    s.rows = in(run, kQ).shape[1];
    s.row = i * s.rows;
    s.k_rows = in(run, kK).shape[1];
    s.k_row = i * s.k_rows;
  }
  s.keys = s.past + s.k_rows;
  if (layer_ >= 0) {
    s.chunks = run.segments[i].cache->chunks(layer_);
  } else {
    const Layout at = layout(run);
    s.chunks = reinterpret_cast<uint8_t**>(temp(run) + at.pointers) + i * at.chunks;
  }
  return s;
}

KvLayout Attention::kv_layout(const Run& run) const {
  if (layer_ >= 0) return run.spec->caches[layer_];
  return {int8_ ? run.spec->kv : KvType::float32, kv_heads_, dim_, v_dim_};
}

Attention::Layout Attention::layout(const Run& run) const {
  Layout at{};
  const auto take = [&at](int64_t bytes) {
    const size_t place = at.total;
    at.total += static_cast<size_t>(round_up(bytes, 64));
    return place;
  };
  const int64_t rows = in(run, kQ).rows(), k_rows = in(run, kK).rows();
  const bool prefill = is_prefill(run);
  at.q = take(prefill ? rows * heads_ * dim_ * 4 : 0);
  at.k = take(prefill ? k_rows * kv_heads_ * dim_ * 4 : 0);
  at.out = take(has_out(0) ? 0 : rows * heads_ * v_dim_ * 4);
  at.begin = take(rows * 4);
  at.end = take(rows * 4);
  if (layer_ < 0) {
    const int64_t keys = by_segments(run) ? max_rows(run) : in(run, kK).shape[1];
    at.chunks = (keys + kChunkTokens - 1) / kChunkTokens;
    at.pointers = take(sequences(run) * at.chunks * static_cast<int64_t>(sizeof(uint8_t*)));
    at.kv = take(sequences(run) * at.chunks * kv_layout(run).chunk_bytes());
  }
  return at;
}

// The output as floats, [rows, heads * value_dim].
float* Attention::attended(const Run& run) const {
  return has_out(0) ? out(run, 0).f32() : temp_floats(run, layout(run).out);
}

// The keys that each row sees; and, without a cache, the pointers to the chunks of the call's own keys and values.
void Attention::fill_ranges(Run& run) const {
  const Layout at = layout(run);
  int32_t* begin = reinterpret_cast<int32_t*>(temp(run) + at.begin);
  int32_t* end = reinterpret_cast<int32_t*>(temp(run) + at.end);
  if (layer_ < 0) {
    const int64_t bytes = kv_layout(run).chunk_bytes();
    uint8_t** pointers = reinterpret_cast<uint8_t**>(temp(run) + at.pointers);
    for (int64_t i = 0; i < sequences(run) * at.chunks; ++i) pointers[i] = temp(run) + at.kv + i * bytes;
  }
  for (int64_t i = 0; i < sequences(run); ++i) {
    const Sequence s = sequence(run, i);
    const int64_t first = bottom_right_ ? s.keys - s.rows : s.past;  // the key at the position of the first query
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t stop = causal_ ? first + r + 1 : s.keys;
      end[s.row + r] = static_cast<int32_t>(stop);
      begin[s.row + r] = static_cast<int32_t>(window_ > 0 ? std::max<int64_t>(0, stop - window_) : 0);
    }
  }
}

}  // namespace edgeformer
