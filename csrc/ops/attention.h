// Attention on rows, with norms of heads, rotation, and append to the KV cache.
//
// Decode (at most kSmallRows rows of every sequence, and a cache): a task is (sequence, KV head, part of the sequence's
// KV chunks). It rotates the queries of its head, rotates and appends the new keys of its own part, and attends. Tasks
// do not wait for each other.
// Prefill: phase 0 rotates and appends by rows; phase 1 attends by tiles of query rows.
// Both: phase 2 merges the parts of split sequences; phase 3 quantizes the output if its blocks are not those of
// heads.
//
//   attention.cpp          the numbers of the operation, and the schedule: phases, chunks, tasks
//   attention_layout.cpp   sequences of a run, and the operation's memory
//   attention_append.cpp   norm and rotation of heads; append of keys and values
//   attention_attend.cpp   a prefill tile, a decode task, the merge of parts
#pragma once

#include "ops/ops.h"

namespace edgeformer {

constexpr int64_t kQueryTile = 16;      // most query rows of a prefill task
constexpr int64_t kAppendRows = 16;     // most rows of an append task
constexpr int64_t kSerialMerge = 4096;  // floats of partials merged without a barrier

class Attention final : public Op {
 public:
  Attention(int index, const OpSpec& spec);

  int phases() const override { return 4; }
  size_t temp_bytes(const Run& run) const override;
  size_t scratch_bytes(const Run& run) const override;
  int64_t begin(Run& run, int phase) const override;
  void work(Run& run, int phase, int64_t chunk, int thread) const override;

 private:
  enum Input { kQ, kK, kV, kMask, kCosQ, kSinQ, kCosK, kSinK, kNormQ, kBiasQ, kNormK, kBiasK };

  // Queries or keys, and what happens to each of their heads before attention.
  struct Side {
    Input x, cos, norm_weight;
    int64_t heads;
    int64_t rotary;  // columns of a head that are rotated
    bool interleaved;
    NormKind norm;
    float eps;

    bool changes() const { return norm != NormKind::none || rotary != 0; }
  };

  // A sequence of the run: its rows, and its place in the cache.
  struct Sequence {
    uint8_t* const* chunks;
    int64_t row, rows;      // queries, in the run
    int64_t past, keys;     // keys before this run, and with it
    int64_t mask_row;       // on the mask's first axis
    int64_t k_row, k_rows;  // new keys, in the run
  };

  // Heads [head, head + heads) of rows [row, row + rows).
  struct HeadRows {
    int64_t row, rows, head, heads;
  };

  // New tokens [first, first + tokens) of a sequence, KV heads [head_begin, head_end).
  struct NewTokens {
    int64_t first, tokens, head_begin, head_end;
    const float* k;  // head 0 of the first token
  };

  // Byte offsets in the operation's temp memory.
  struct Layout {
    size_t q, k;          // rotated queries and keys of a prefill
    size_t out;           // the output as floats, if only the quantized one is wanted
    size_t begin, end;    // of every row: the range of keys it sees, int32
    size_t pointers, kv;  // keys and values of a call without a cache, and pointers to their chunks
    int64_t chunks;       // of each sequence there
    size_t total;
  };

  // -- attention.cpp
  bool is_prefill(const Run& run) const { return max_rows(run) > kSmallRows || layer_ < 0; }
  int64_t begin_append(Run& run) const;
  AttentionPlan new_plan(const Run& run) const;
  int64_t begin_attend(Run& run) const;
  int64_t begin_merge(Run& run) const;

  // -- attention_layout.cpp
  bool by_segments(const Run& run) const;
  int64_t sequences(const Run& run) const;
  int64_t max_rows(const Run& run) const;
  Sequence sequence(const Run& run, int64_t i) const;
  KvLayout kv_layout(const Run& run) const;
  Layout layout(const Run& run) const;
  void fill_ranges(Run& run) const;
  float* attended(const Run& run) const;
  uint8_t* temp(const Run& run) const { return static_cast<uint8_t*>(run.temp[index_]); }
  float* temp_floats(const Run& run, size_t at) const { return reinterpret_cast<float*>(temp(run) + at); }
  int64_t total_rows(const Run& run) const { return in(run, kQ).rows(); }

  // -- attention_append.cpp
  void rotate(const Run& run, const Side& side, const HeadRows& part, float* y) const;
  void append(const Run& run, const Sequence& s, const NewTokens& tokens) const;
  void prefetch_place(const Run& run, const Sequence& s, int64_t token, int64_t kv_head) const;
  void append_rows(const Run& run, int64_t row, int64_t rows) const;

  // -- attention_attend.cpp
  AttentionArgs attention_args(const Run& run, const Sequence& s, const float* q) const;
  const uint8_t* first_keys(const Run& run, const Sequence& s, int64_t kv_head) const;
  void attend_tile(Run& run, int64_t task, int64_t tile) const;
  void decode(Run& run, int64_t chunk, int thread) const;
  void merge(Run& run, int64_t task) const;
  float* partial(Run& run, const Sequence& s, int64_t kv_head, int64_t chunk) const;
  int64_t partial_row(const Run& run) const { return partial_floats(kv_layout(run)); }
  bool quantizes_by_head(const Run& run) const { return group_ * v_dim_ % out(run, 1).span() == 0; }
  void quantize_head(const Run& run, const Sequence& s, int64_t kv_head, int64_t first, int64_t rows) const;

  const int64_t heads_, kv_heads_, group_;  // group: query heads of one KV head
  const int64_t dim_, v_dim_;
  const int64_t layer_;      // of the state's caches; -1: the call's own keys and values alone
  const bool causal_;        // a query sees no key after its own
  const bool bottom_right_;  // causal: the last query is aligned with the last key, else the first with the first new
  const bool int8_;          // keys and values without a cache are int8, if those of a cache are
  const int64_t window_;     // keys that a query sees, 0: all
  const float scale_, softcap_;
  const Side q_, k_;
};

}  // namespace edgeformer
