// Attention on rows, with rotation, head norms and cache append.
//
// Decoding (few rows a sequence): one phase of tasks (sequence, KV head, part of the sequence); a task rotates the
// queries of its head, rotates and appends the new keys that fall into its own part, and attends. Nothing waits.
// Prefill: phase 0 rotates and appends by rows, phase 1 attends by tiles of query rows.
// The last phase merges split sequences and quantizes what could not be quantized earlier.
#include <algorithm>
#include <cstring>

#include "ops/ops.h"

namespace edgeformer {
namespace {

constexpr int64_t kQueryTile = 16;
constexpr int64_t kPrepRows = 16;
constexpr int64_t kSerialMerge = 4096;  // floats of partials merged without a barrier

enum Input { kQ, kK, kV, kMask, kCosQ, kSinQ, kCosK, kSinK, kNormQ, kBiasQ, kNormK, kBiasK };
// The run's state: [0] prefill?, [1] KV chunks a task (0: whole sequences), [2] most KV chunks of a sequence
enum State { kPrefill, kSplit, kChunks, kTasks, kStateSize };

struct Sequence {
  uint8_t* const* chunks;
  int64_t row, rows, past, keys, mask_row;
  int64_t k_row, k_rows;  // new keys
};

class Attend final : public Op {
 public:
  Attend(int index, const OpSpec& s)
      : Op(index, s),
        heads_(s.integer("heads")),
        kv_heads_(s.integer("kv_heads")),
        dim_(s.integer("head_dim")),
        v_dim_(s.integer("value_dim")),
        layer_(s.integer("layer")),
        causal_(s.integer("causal") != 0),
        at_end_(s.integer("at_end") != 0),
        integers_(s.integer("integers") != 0),
        window_(s.integer("window")),
        scale_(s.number("scale")),
        softcap_(s.number("softcap")),
        q_{s.integer("rotary"), s.integer("interleaved") != 0, static_cast<int>(s.integer("q_norm")),
           s.number("q_eps")},
        k_{s.integer("rotary_k"), s.integer("interleaved_k") != 0, static_cast<int>(s.integer("k_norm")),
           s.number("k_eps")},
        group_(heads_ / kv_heads_) {}

  int phases() const override { return 3; }

  // Shared: rotated q and k (prefill), the output as floats if only the quantized one is wanted, key ranges, and,
  // without a cache, the keys and values of the call.
  size_t temp_bytes(const Run& run) const override { return layout(run).total; }

  size_t scratch_bytes(const Run& run) const override {
    // Decoding: the rotated queries and keys of one sequence.
    return static_cast<size_t>(round_up(std::min(max_rows(run), kSmallRows) * (heads_ + kv_heads_) * dim_, 64)) *
           sizeof(float);
  }

  int64_t begin(Run& run, int phase) const override {
    if (out_tensor(run).count == 0) return 0;
    std::vector<int64_t>& s = state(run);
    if (phase == 0) {
      fill_ranges(run);
      s.assign(kStateSize, 0);
      s[kPrefill] = max_rows(run) > kSmallRows || layer_ < 0;
      for (int64_t i = 0; i < sequences(run); ++i) {
        s[kChunks] = std::max(s[kChunks], (sequence(run, i).keys + kChunkTokens - 1) / kChunkTokens);
      }
      if (!s[kPrefill]) return 0;
      const int64_t rows = std::max(in(run, kQ).rows(), in(run, kK).rows());
      return (rows + kPrepRows - 1) / kPrepRows;
    }
    if (phase == 1) {
      const int64_t tasks = sequences(run) * kv_heads_;
      if (s[kPrefill]) {
        const int64_t tiles = (max_rows(run) + kQueryTile - 1) / kQueryTile;
        // Many short sequences: a task is small, so a thread takes several at a time.
        s[kTasks] = tiles > 1 ? 1 : std::max<int64_t>(1, tasks / (run.threads * 16));
        return (tasks + s[kTasks] - 1) / s[kTasks] * tiles;
      }
      if (s[kChunks] > 1 && run.threads > 1 && tasks < run.threads * 4) {
        s[kSplit] = std::max<int64_t>(1, s[kChunks] * tasks / (run.threads * 16));
        const size_t floats = static_cast<size_t>(total_rows(run) * heads_ * s[kChunks] * partial_row(run));
        if (run.partials.size() < floats) run.partials.resize(floats + floats / 2);
        return tasks * ((s[kChunks] + s[kSplit] - 1) / s[kSplit]);
      }
      return tasks;
    }
    if (s[kSplit]) {
      const int64_t tasks = sequences(run) * kv_heads_;
      if (total_rows(run) * heads_ * s[kChunks] * v_dim_ > kSerialMerge) return tasks;
      for (int64_t t = 0; t < tasks; ++t) merge(run, t);
    }
    if (has_out(1) && !quantizes_by_head(run)) {
      const Tensor& q = out(run, 1);
      run.k->quantize(attended(run), heads_ * v_dim_, q.rows(), q.columns(), q.span(), 0, blocks_of(q.columns()),
                      q.xq(), q.xb());
    }
    return 0;
  }

  void work(Run& run, int phase, int64_t chunk, int thread) const override {
    const std::vector<int64_t>& s = state(run);
    if (phase == 0) {
      prepare(run, chunk * kPrepRows, kPrepRows);
    } else if (phase == 1 && s[kPrefill]) {
      const int64_t tiles = (max_rows(run) + kQueryTile - 1) / kQueryTile, task = chunk / tiles * s[kTasks];
      const int64_t end = std::min(task + s[kTasks], sequences(run) * kv_heads_);
      // The last query tiles see the most keys: they go first, so that the threads end together.
      for (int64_t t = task; t < end; ++t) prefill(run, t, (tiles - 1 - chunk % tiles) * kQueryTile);
    } else if (phase == 1) {
      decode(run, chunk, thread);
    } else {
      merge(run, chunk);
    }
  }

 private:
  struct Turn {
    int64_t rotary;
    bool interleaved;
    int norm;  // 0 none, 1 rms, 2 layer
    float eps;
  };
  struct Places {
    size_t q, k, out, begin, end, pointers, cache, total;
    int64_t cache_chunks;
  };

  const Tensor& out_tensor(const Run& run) const { return has_out(0) ? out(run, 0) : out(run, 1); }
  bool quantizes_by_head(const Run& run) const { return group_ * v_dim_ % out(run, 1).span() == 0; }
  int64_t partial_row(const Run& run) const { return partial_floats(kv_layout(run)); }
  int64_t total_rows(const Run& run) const { return in(run, kQ).rows(); }

  KvLayout kv_layout(const Run& run) const {
    if (layer_ >= 0) return run.spec->caches[layer_];
    return {integers_ ? run.spec->kv : KvType::float32, kv_heads_, dim_, v_dim_};
  }

  // Sequences of this call: the run's segments where rows of states run together or own caches, else q's first axis.
  bool by_segments(const Run& run) const { return layer_ >= 0 || run.spec->row_local; }
  int64_t sequences(const Run& run) const {
    return by_segments(run) ? static_cast<int64_t>(run.segments.size()) : in(run, kQ).shape[0];
  }
  int64_t max_rows(const Run& run) const {
    if (!by_segments(run)) return in(run, kQ).shape[1];
    int64_t most = 0;
    for (const Segment& s : run.segments) most = std::max(most, s.rows);
    return most;
  }

  Sequence sequence(const Run& run, int64_t i) const {
    Sequence s{};
    if (by_segments(run)) {
      const Segment& g = run.segments[i];
      s = {nullptr, g.row, g.rows, layer_ >= 0 ? g.past : 0, 0, i, g.row, g.rows};
    } else {
      const int64_t rows = in(run, kQ).shape[1], keys = in(run, kK).shape[1];
      s = {nullptr, i * rows, rows, 0, 0, i, i * keys, keys};
    }
    s.keys = s.past + s.k_rows;
    if (layer_ >= 0) {
      s.chunks = run.segments[i].cache->chunks(layer_);
    } else {
      const Places p = layout(run);
      s.chunks = reinterpret_cast<uint8_t**>(temp(run) + p.pointers) + i * p.cache_chunks;
    }
    return s;
  }

  uint8_t* temp(const Run& run) const { return static_cast<uint8_t*>(run.temp[index_]); }

  Places layout(const Run& run) const {
    Places p{};
    size_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const size_t place = at;
      at += static_cast<size_t>(round_up(bytes, 64));
      return place;
    };
    const int64_t rows = in(run, kQ).rows(), k_rows = in(run, kK).rows();
    const bool prefill = max_rows(run) > kSmallRows || layer_ < 0;
    p.q = take(prefill ? rows * heads_ * dim_ * 4 : 0);
    p.k = take(prefill ? k_rows * kv_heads_ * dim_ * 4 : 0);
    p.out = take(has_out(0) ? 0 : rows * heads_ * v_dim_ * 4);
    p.begin = take(rows * 4);
    p.end = take(rows * 4);
    if (layer_ < 0) {
      int64_t keys = 0;
      if (by_segments(run)) {
        keys = max_rows(run);
      } else {
        keys = in(run, kK).shape[1];
      }
      p.cache_chunks = (keys + kChunkTokens - 1) / kChunkTokens;
      p.pointers = take(sequences(run) * p.cache_chunks * static_cast<int64_t>(sizeof(uint8_t*)));
      p.cache = take(sequences(run) * p.cache_chunks * kv_layout(run).chunk_bytes());
    }
    p.total = at;
    return p;
  }

  float* attended(const Run& run) const {
    return has_out(0) ? out(run, 0).f32() : reinterpret_cast<float*>(temp(run) + layout(run).out);
  }

  void fill_ranges(Run& run) const {
    const Places p = layout(run);
    int32_t* begin = reinterpret_cast<int32_t*>(temp(run) + p.begin);
    int32_t* end = reinterpret_cast<int32_t*>(temp(run) + p.end);
    if (layer_ < 0) {
      const int64_t bytes = kv_layout(run).chunk_bytes();
      uint8_t** pointers = reinterpret_cast<uint8_t**>(temp(run) + p.pointers);
      for (int64_t i = 0; i < sequences(run) * p.cache_chunks; ++i) pointers[i] = temp(run) + p.cache + i * bytes;
    }
    for (int64_t i = 0; i < sequences(run); ++i) {
      const Sequence s = sequence(run, i);
      for (int64_t r = 0; r < s.rows; ++r) {
        const int64_t first = at_end_ ? s.keys - s.rows : s.past;  // the key as old as the first query
        const int64_t stop = causal_ ? first + r + 1 : s.keys;
        end[s.row + r] = static_cast<int32_t>(stop);
        begin[s.row + r] = static_cast<int32_t>(window_ > 0 ? std::max<int64_t>(0, stop - window_) : 0);
      }
    }
  }

  // Norm and rotation of `count` heads from `head` on, of m rows: x and y hold `heads` heads a row.
  void turn(const Run& run, const Turn& t, Input x_in, Input cos_in, Input norm_in, int64_t row, int64_t m,
            int64_t heads, int64_t head, int64_t count, float* y) const {
    const int64_t ld = heads * dim_, offset = head * dim_;
    const float* x = in(run, x_in).f32() + row * ld + offset;
    y += offset;
    if (t.norm) {
      const float* weight = has_in(norm_in) ? in(run, norm_in).f32() : nullptr;
      const float* bias = has_in(norm_in + 1) ? in(run, norm_in + 1).f32() : nullptr;
      for (int64_t h = 0; h < count; ++h) {
        if (t.norm == 1) {
          run.k->rms_norm(x + h * dim_, ld, m, dim_, weight, t.eps, y + h * dim_, ld);
        } else {
          run.k->layer_norm(x + h * dim_, ld, m, dim_, weight, bias, t.eps, y + h * dim_, ld);
        }
      }
      x = y;
    }
    if (t.rotary) {
      const Tensor &cos = in(run, cos_in), &sin = in(run, cos_in + 1);
      const int64_t ldc = cos.columns();
      run.k->rope(x, ld, m, count, dim_, t.rotary, t.interleaved, cos.f32() + row * ldc, sin.f32() + row * ldc, ldc, y,
                  ld);
    } else if (!t.norm) {
      for (int64_t r = 0; r < m; ++r) std::memcpy(y + r * ld, x + r * ld, count * dim_ * sizeof(float));
    }
  }

  bool turns(const Turn& t) const { return t.norm || t.rotary; }

  void append(const Run& run, const Sequence& s, int64_t first, int64_t tokens, int64_t head_begin, int64_t head_end,
              const float* k) const {
    KvAppendArgs a{};
    a.layout = kv_layout(run);
    a.chunks = s.chunks;
    a.position = s.past + first;
    a.tokens = tokens;
    a.head_begin = head_begin;
    a.head_end = head_end;
    a.k = k;
    a.ldk = kv_heads_ * dim_;
    a.v = in(run, kV).f32() + (s.k_row + first) * kv_heads_ * v_dim_;
    a.ldv = kv_heads_ * v_dim_;
    run.k->kv_append(a);
  }

  AttentionArgs attention(const Run& run, const Sequence& s, const float* q) const {
    const Places p = layout(run);
    AttentionArgs a{};
    a.layout = kv_layout(run);
    a.chunks = s.chunks;
    a.group = group_;
    a.tokens = s.rows;
    a.q = q;
    a.ldq = heads_ * dim_;
    a.begin = reinterpret_cast<const int32_t*>(temp(run) + p.begin) + s.row;
    a.end = reinterpret_cast<const int32_t*>(temp(run) + p.end) + s.row;
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

  void quantize_head(const Run& run, const Sequence& s, int64_t kv_head, int64_t first, int64_t rows) const {
    if (!has_out(1) || !quantizes_by_head(run)) return;
    const Tensor& q = out(run, 1);
    const int64_t n = q.columns(), blocks = blocks_of(n), row = s.row + first, per_head = group_ * v_dim_ / kBlock;
    run.k->quantize(attended(run) + row * n, n, rows, n, q.span(), kv_head * per_head, (kv_head + 1) * per_head,
                    q.xq() + row * blocks * kBlock, q.xb() + row * blocks);
  }

  void prepare(const Run& run, int64_t row, int64_t rows) const {
    const Places p = layout(run);
    float* q = reinterpret_cast<float*>(temp(run) + p.q);
    float* k = reinterpret_cast<float*>(temp(run) + p.k);
    const int64_t q_rows = std::min(rows, in(run, kQ).rows() - row);
    if (q_rows > 0 && turns(q_))
      turn(run, q_, kQ, kCosQ, kNormQ, row, q_rows, heads_, 0, heads_, q + row * heads_ * dim_);
    const int64_t k_end = std::min(row + rows, in(run, kK).rows());
    const int64_t each = by_segments(run) ? 0 : in(run, kK).shape[1];  // keys of a sequence, where all have as many
    for (int64_t i = each ? row / each : 0; i < sequences(run); ++i) {
      const Sequence s = sequence(run, i);
      if (s.k_row >= k_end) break;
      // Two tokens from an even position on share bytes of the cache: their rows stay together, with the first one's.
      const auto whole = [&s](int64_t r) { return r <= s.k_row ? s.k_row : r + (s.past + r - s.k_row) % 2; };
      const int64_t first = whole(row), last = std::min(whole(k_end), s.k_row + s.k_rows);
      if (first >= last) continue;
      const float* keys = in(run, kK).f32() + first * kv_heads_ * dim_;
      if (turns(k_)) {
        float* turned = k + first * kv_heads_ * dim_;
        turn(run, k_, kK, kCosK, kNormK, first, last - first, kv_heads_, 0, kv_heads_, turned);
        keys = turned;
      }
      append(run, s, first - s.k_row, last - first, 0, kv_heads_, keys);
    }
  }

  void prefill(const Run& run, int64_t task, int64_t first) const {
    const Sequence s = sequence(run, task / kv_heads_);
    const int64_t kv_head = task % kv_heads_, last = std::min(first + kQueryTile, s.rows);
    if (first >= last) return;
    const float* q = turns(q_) ? reinterpret_cast<const float*>(temp(run) + layout(run).q) : in(run, kQ).f32();
    run.k->attention(attention(run, s, q + s.row * heads_ * dim_), kv_head, first, last);
    quantize_head(run, s, kv_head, first, last - first);
  }

  void decode(Run& run, int64_t chunk, int thread) const {
    const std::vector<int64_t>& st = state(run);
    const int64_t parts = st[kSplit] ? (st[kChunks] + st[kSplit] - 1) / st[kSplit] : 1;
    const int64_t task = chunk / parts, kv_head = task % kv_heads_;
    const Sequence s = sequence(run, task / kv_heads_);
    if (s.rows == 0) return;
    const int64_t c_begin = st[kSplit] ? chunk % parts * st[kSplit] : 0;
    const int64_t c_end = st[kSplit] ? std::min(c_begin + st[kSplit], st[kChunks]) : st[kChunks];

    float* scratch = reinterpret_cast<float*>(run.scratch[thread]);
    const float* q = in(run, kQ).f32() + s.row * heads_ * dim_;
    if (turns(q_)) {
      turn(run, q_, kQ, kCosQ, kNormQ, s.row, s.rows, heads_, kv_head * group_, group_, scratch);
      q = scratch;
    }
    // The new tokens that lie in this part: only its owner reads them.
    const int64_t first = std::max<int64_t>(0, c_begin * kChunkTokens - s.past);
    const int64_t last = std::min(s.rows, c_end * kChunkTokens - s.past);
    if (first < last) {
      const float* k = in(run, kK).f32() + (s.row + first) * kv_heads_ * dim_;
      if (turns(k_)) {
        float* turned = scratch + s.rows * heads_ * dim_;
        turn(run, k_, kK, kCosK, kNormK, s.row + first, last - first, kv_heads_, kv_head, 1, turned);
        k = turned;
      }
      append(run, s, first, last - first, kv_head, kv_head + 1, k);
    }
    const AttentionArgs a = attention(run, s, q);
    if (!st[kSplit]) {
      run.k->attention(a, kv_head, 0, s.rows);
      quantize_head(run, s, kv_head, 0, s.rows);
      return;
    }
    const int64_t row = partial_row(run);
    for (int64_t c = c_begin; c < c_end; ++c) {
      float* partial = partial_of(run, s, kv_head, c);
      if (c * kChunkTokens < s.keys) {
        run.k->attention_partial(a, kv_head, 0, s.rows, c, partial);
      } else {
        for (int64_t i = 0; i < s.rows * group_; ++i) {
          partial[i * row] = -__builtin_inff();
          partial[i * row + 1] = 0;
        }
      }
    }
  }

  // Partials: [sequence rows][kv head][chunk][rows * group][partial_row]
  float* partial_of(Run& run, const Sequence& s, int64_t kv_head, int64_t chunk) const {
    const int64_t row = partial_row(run), chunks = state(run)[kChunks];
    return run.partials.data() + ((s.row * kv_heads_ + kv_head * s.rows) * chunks + chunk * s.rows) * group_ * row;
  }

  void merge(Run& run, int64_t task) const {
    const Sequence s = sequence(run, task / kv_heads_);
    const int64_t kv_head = task % kv_heads_;
    if (s.rows == 0) return;
    const int64_t chunks = (s.keys + kChunkTokens - 1) / kChunkTokens;
    run.k->attention_merge(attention(run, s, nullptr), kv_head, 0, s.rows, chunks, partial_of(run, s, kv_head, 0),
                           s.rows * group_ * partial_row(run));
    quantize_head(run, s, kv_head, 0, s.rows);
  }

  const int64_t heads_, kv_heads_, dim_, v_dim_, layer_;
  const bool causal_, at_end_, integers_;
  const int64_t window_;
  const float scale_, softcap_;
  const Turn q_, k_;
  const int64_t group_;
};

}  // namespace

std::unique_ptr<Op> make_attention_op(int index, const OpSpec& spec) {
  if (spec.kind == "attend") return std::make_unique<Attend>(index, spec);
  return nullptr;
}

}  // namespace edgeformer
