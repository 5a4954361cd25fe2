// The executor: packed weights, the operations of one program, and `forward`. Immutable but for its working memory,
// which one forward at a time uses; states are the callers'.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/pack.h"
#include "ops/ops.h"
#include "platform/threads.h"
#include "platform/work_ranges.h"
#include "program/kv_cache.h"
#include "program/program.h"

namespace edgeformer {

// What one sequence (or one batch of them) owns.
struct State {
  std::vector<std::unique_ptr<KvCache>> caches;  // one for each row of the batch axis; made by the first forward
  std::atomic<int64_t> user{0};                  // the process whose thread is in it, 0 for none
  int64_t length() const { return caches.empty() ? 0 : caches[0]->length(); }
};

// One (inputs, state) of a forward, checked by the bindings.
struct Call {
  State* state;
  std::vector<const void*> inputs;           // by ProgramSpec::inputs, contiguous
  std::vector<std::vector<int64_t>> shapes;  // of the inputs
  int64_t batch = 1, rows = 1;               // sequences and rows of each, for programs with states
  int64_t keep = 0;                          // logits_to_keep
  std::vector<int64_t> symbols;              // of ProgramSpec::symbols
};

struct FreePages {
  size_t bytes = 0;
  void operator()(void* p) const { pages_free(p, bytes); }
};

class Engine {
 public:
  // Nothing large is allocated here. threads >= 1. `context`: the most tokens of a state.
  Engine(ProgramSpec spec, const Kernels& kernels, int threads, int64_t context, int64_t prefill_rows);
  ~Engine();

  const ProgramSpec& spec() const { return spec_; }
  const Kernels& kernels() const { return kernels_; }
  int threads() const { return pool_.threads(); }
  int64_t context() const { return context_; }
  size_t weight_bytes() const;
  size_t kv_bytes(int64_t tokens) const { return KvCache::bytes_for(spec_.caches, tokens); }
  // Working memory for these symbols (one state).
  size_t scratch_bytes(const std::vector<int64_t>& symbols, int64_t rows, int64_t past);

  // Packs the rows of a source into weight `weight`; `rounded` where some scale had no exact fp16 value. Several
  // threads may pack at once, each rows of its own.
  PackResult pack(int weight, const PackSource& source, const int64_t* dest);
  // All packed weights, one behind the other, as the first `pack` makes room for them; null before.
  const uint8_t* packed() const { return packed_; }
  size_t packed_size() const;
  // Takes packed_size() bytes, on a cache line, that another engine of the same program packed. They stay the caller's.
  void use_packed(const uint8_t* at);
  // work(0) ... work(count - 1) by all threads, claimed in this order.
  void in_parallel(int64_t count, FunctionRef<void(int64_t)> work);

  // Nanoseconds spent in each operation since the last call, and the number of runs; counting is on from `on` = true
  // on.
  struct Profile {
    std::vector<int64_t> nanoseconds;
    int64_t runs = 0;
  };
  Profile profile(bool on);

  std::unique_ptr<KvCache> new_cache() const { return std::make_unique<KvCache>(spec_.caches, context_); }

  // The shape of output `output` of a call.
  std::vector<int64_t> output_shape(const Call& call, size_t output) const;
  // Runs the calls, in order; each state grows by its rows. outputs[o]: room for output o of all calls, one after
  // another. On an exception no state has changed.
  void forward(std::vector<Call>& calls, const std::vector<void*>& outputs);

 private:
  struct Output {
    uint8_t* data;
    size_t at;
  };
  struct Piece {  // rows of one sequence of one call that run together
    int call;
    int64_t sequence, first, rows, kept;
  };

  void run_rows(std::vector<Call>& calls, std::vector<Output>& outputs);
  void run_alone(Call& call, std::vector<Output>& outputs);
  void run_pieces(const std::vector<Call>& calls, const std::vector<Piece>& pieces, std::vector<Output>& outputs);
  void execute(std::vector<Output>& outputs);
  void make_weights();
  void run_phases();
  void prepare(const std::vector<int64_t>& symbols);
  void place();
  void set_shapes(Run& run, const std::vector<int64_t>& symbols) const;
  size_t lay_out(Run& run, std::vector<size_t>* offsets, std::vector<size_t>* temp, size_t* scratch) const;
  int root(int slot) const;
  void after_fork();

  ProgramSpec spec_;
  Kernels kernels_;
  int64_t context_, prefill_rows_;
  const uint8_t* packed_ = nullptr;
  std::unique_ptr<uint8_t, FreePages> own_;  // where packed_ lies, if this engine packed
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<std::pair<int, int>> phases_;  // (operation, its phase)
  std::vector<int> last_use_;                // by root slot: the last operation that touches it
  std::vector<int> direct_output_;           // by slot: the output whose memory it writes itself, -1

  std::mutex mutex_;  // one forward at a time uses what is below
  int64_t process_;
  ThreadPool pool_;
  WorkRanges ranges_;  // of the phase that runs
  Run run_;
  std::vector<int64_t> planned_;  // sizes and pieces for which run_ is laid out
  std::vector<size_t> offsets_, temp_;
  std::unique_ptr<uint8_t, void (*)(void*)> arena_;
  bool profiling_ = false;
  Profile profile_;
  size_t arena_bytes_ = 0, scratch_at_ = 0, scratch_bytes_ = 0;
};

}  // namespace edgeformer
