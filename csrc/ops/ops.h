// Operations: each reads its own fields once from an OpSpec and then runs, in phases, on the tensors of a Run.
#pragma once

#include <cstdint>
#include <memory>
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
  int64_t kept;  // so many of the last rows are kept by Keep
};

// What one forward works on. One at a time per engine.
struct Run {
  const Kernels* k = nullptr;
  const ProgramSpec* spec = nullptr;
  int threads = 1;
  std::vector<int64_t> sizes;  // values of ProgramSpec::sizes
  std::vector<Tensor> tensors;
  std::vector<Segment> segments;
  std::vector<const void*> weights;         // packed
  std::vector<std::vector<int64_t>> state;  // per operation: what its begin() decided for its work()
  std::vector<void*> temp;                  // per operation: its temp_bytes(), in the arena
  std::vector<uint8_t*> scratch;            // per thread: the largest scratch_bytes() of all operations
  std::vector<float> partials;              // attention over a split sequence; grows with the context
};

class Op {
 public:
  Op(int index, const OpSpec& spec) : index_(index), spec_(spec) {}
  virtual ~Op() = default;
  virtual int phases() const { return 1; }
  // Shared memory for the time of this operation, and memory of each thread, for the run's sizes.
  virtual size_t temp_bytes(const Run&) const { return 0; }
  virtual size_t scratch_bytes(const Run&) const { return 0; }
  // Serial; returns the number of chunks of work. Small work is done here: it costs no barrier.
  virtual int64_t begin(Run& run, int phase) const = 0;
  virtual void work(Run&, int /*phase*/, int64_t /*chunk*/, int /*thread*/) const {}

 protected:
  const Tensor& in(const Run& run, int i) const { return run.tensors[spec_.inputs[i]]; }
  const Tensor& out(const Run& run, int i) const { return run.tensors[spec_.outputs[i]]; }
  bool has_in(int i) const { return i < static_cast<int>(spec_.inputs.size()) && spec_.inputs[i] >= 0; }
  bool has_out(int i) const { return spec_.outputs[i] >= 0; }
  std::vector<int64_t>& state(Run& run) const { return run.state[index_]; }

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

// Throws std::logic_error for a kind that does not exist (the lowering never makes one).
std::unique_ptr<Op> make_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_row_op(int index, const OpSpec& spec);        // null for a kind of another file
std::unique_ptr<Op> make_attention_op(int index, const OpSpec& spec);  //
std::unique_ptr<Op> make_history_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_elementwise_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_pointwise_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_shape_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_axis_op(int index, const OpSpec& spec);
std::unique_ptr<Op> make_math_op(int index, const OpSpec& spec);

}  // namespace edgeformer
