// Operations: each reads its own fields once from an OpSpec and then runs, in phases, on the tensors of a Run.
#pragma once

#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "program/kv_cache.h"
#include "program/program.h"

namespace edgeformer {

// Consecutive rows of one sequence.
struct Segment {
  KvCache* cache;  // null where the program has none
  int64_t row;     // first row in this run
  int64_t rows;
  int64_t past;  // tokens in the cache before these rows
  int64_t kept;  // the number of last rows that Keep keeps
};

// What an operation's begin() decided for its work().
struct ParallelPlan {
  int64_t units = 0;  // of the operation
  int64_t grain = 1;  // units of a chunk
};
struct LinearPlan {
  int64_t row_tile = 0;   // rows of a chunk
  int64_t units = 0;      // of 32 output columns, of a chunk
  int64_t row_tiles = 0;  // of the operation
};
struct AttentionPlan {
  bool prefill = false;
  int64_t kv_chunks = 0;        // most KV chunks of a sequence
  int64_t split = 0;            // decode: KV chunks of a task, 0: a task takes its whole sequence
  int64_t first = 0;            // the sequence with the most work: its tasks go first, so that the threads end together
  int64_t tile = 0, tiles = 0;  // prefill: query rows of a task, tasks of a sequence and KV head
  int64_t append_rows = 0;      // prefill: rows of an append task
  int64_t tasks_per_work = 1;   // prefill: (sequence, KV head) pairs of one chunk of work
};
using Plan = std::variant<ParallelPlan, LinearPlan, AttentionPlan>;

// What one forward works on. One at a time per engine.
struct Run {
  const Kernels* k = nullptr;
  const ProgramSpec* spec = nullptr;
  int threads = 1;
  std::vector<int64_t> sizes;  // values of ProgramSpec::sizes
  std::vector<Tensor> tensors;
  std::vector<Segment> segments;
  std::vector<const void*> weights;  // packed
  std::vector<Plan> plans;           // per operation
  std::vector<void*> temp;           // per operation: its temp_bytes(), in the arena
  std::vector<uint8_t*> scratch;     // per thread: the largest scratch_bytes() of all operations
  std::vector<float> partials;       // attention over a split sequence; grows with the context
};

// One operation of a program.
//
//   method           called                                 by               may change
//   temp_bytes       when memory is laid out                one thread       nothing
//   scratch_bytes    when memory is laid out                one thread       nothing
//   begin(phase)     in order of phases, after all work of  one thread       its plan, its outputs
//                    the phase before
//   work(chunk)      once for each chunk that begin counted any thread       its outputs, temp, the thread's scratch
class Op {
 public:
  Op(int index, const OpSpec& spec) : index_(index), spec_(spec) {}
  virtual ~Op() = default;
  virtual int phases() const { return 1; }
  // Bytes that live as long as this operation runs: common to all threads, and of each thread.
  virtual size_t temp_bytes(const Run&) const { return 0; }
  virtual size_t scratch_bytes(const Run&) const { return 0; }
  // Returns the number of chunks of work. Small work is done here: it costs no barrier.
  virtual int64_t begin(Run& run, int phase) const = 0;
  virtual void work(Run&, int /*phase*/, int64_t /*chunk*/, int /*thread*/) const {}

 protected:
  const Tensor& in(const Run& run, int i) const { return run.tensors[spec_.inputs[i]]; }
  const Tensor& out(const Run& run, int i) const { return run.tensors[spec_.outputs[i]]; }
  bool has_in(int i) const { return i < static_cast<int>(spec_.inputs.size()) && spec_.inputs[i] >= 0; }
  bool has_out(int i) const { return spec_.outputs[i] >= 0; }
  template <class T>
  T& plan(Run& run) const {
    return std::get<T>(run.plans[index_]);
  }

  const int index_;
  const OpSpec& spec_;  // owned by the engine, which outlives its operations
};

// An operation over independent units (rows, output elements, ...): serial when there is little to do.
class ParallelOp : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override;
  void work(Run& run, int, int64_t chunk, int thread) const override;

 protected:
  virtual int64_t units(const Run& run) const = 0;
  virtual int64_t unit_cost(const Run&) const { return 1; }  // in elements touched
  virtual void run_units(Run& run, int64_t begin, int64_t end, int thread) const = 0;
};

// Rows of floats to quantize to blocks [block_begin, block_end) of the rows of q from `row` on.
struct RowsToQuantize {
  const float* x;  // column 0 of the first row
  int64_t ldx;     // floats from a row to the next
  int64_t row, rows;
  int64_t block_begin, block_end;
};
inline void quantize_rows(const Run& run, const Tensor& q, const RowsToQuantize& r) {
  const int64_t first = r.row * blocks_of(q.columns());
  run.k->quantize({.x = r.x,
                   .ldx = r.ldx,
                   .m = r.rows,
                   .k = q.columns(),
                   .span = q.span(),
                   .block_begin = r.block_begin,
                   .block_end = r.block_end,
                   .xq = q.xq() + first * kBlock,
                   .xb = q.xb() + first});
}

// The operation of a spec. Throws UnknownName.
std::unique_ptr<Op> make_op(int index, const OpSpec& spec);
// The same for the kinds of one file; null for all others.
std::unique_ptr<Op> make_row_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_linear_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_attention_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_history_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_elementwise_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_pointwise_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_shape_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_axis_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_math_op(int index, const OpSpec& spec);

}  // namespace edgeformer
