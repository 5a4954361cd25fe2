// The executor: packed weights, the operations of one program, and `forward`.
//
//   what                     owner     changes                                 threads
//   spec, kernels, ops       Engine    never                                   any number read
//   packed weights           Engine    pack() fills them once; use_packed()    several pack() at once, of disjoint rows;
//                            or caller borrows those of another engine         no forward() before all are there
//   arena, run, partials     Engine    every forward()                         one forward at a time: forward() locks
//   State (KV caches)        caller    forward() appends, truncate, select     one call at a time: the bindings refuse
//                                                                              a second one
//   inputs, output memory    caller    outputs: forward() writes them          not read by others during forward()
//
//   method          needs                     throws, and leaves behind
//   forward         checked calls, weights    InputProblem, std::length_error, std::bad_alloc, Interrupted, Reentered:
//                                             no state has changed
//   pack            rows of `weight`          std::bad_alloc; PackResult::error for values that the type cannot hold
//   scratch_bytes   symbols of a call         InputProblem for sizes that cannot be
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels/pack.h"
#include "ops/ops.h"
#include "platform/memory.h"
#include "platform/threads.h"
#include "platform/work_ranges.h"
#include "program/kv_cache.h"
#include "program/program.h"

namespace edgeformer {

// What one sequence (or one batch of them) owns.
struct State {
  std::vector<std::unique_ptr<KvCache>> caches;  // one for each row of the batch axis; made by the first forward
  std::atomic<int64_t> user{0};                  // the process whose thread uses it, 0 for none
  int64_t length() const { return caches.empty() ? 0 : caches[0]->length(); }
};

// One (inputs, state) of a forward, checked by the bindings.
struct Call {
  State* state;
  std::vector<const void*> inputs;           // by ProgramSpec::inputs, contiguous
  std::vector<std::vector<int64_t>> shapes;  // of the inputs
  int64_t batch = 1, rows = 1;               // sequences and rows of each, for programs with states
  int64_t logits_to_keep = 0;                // 0: all
  std::vector<int64_t> symbols;              // of ProgramSpec::symbols

  // Rows of each sequence that Keep keeps.
  int64_t kept() const { return logits_to_keep == 0 ? rows : std::min(logits_to_keep, rows); }
};

// forward() ended early, because its poll said so.
struct Interrupted {};
// forward() was called by the thread that runs one already: by a poll.
struct Reentered {};

using Clock = std::chrono::steady_clock;

// Asks from time to time whether a run shall end early. Used by one thread.
class Poll {
 public:
  // A poll costs little, but it may take Python's lock, for which it waits up to 5 ms where other threads want it.
  static constexpr std::chrono::milliseconds kEvery{50};

  explicit Poll(FunctionRef<bool()>* ask) : ask_(ask), next_(Clock::now() + kEvery) {}
  // Throws Interrupted.
  void operator()() {
    if (!ask_ || Clock::now() < next_) return;
    if ((*ask_)()) throw Interrupted();
    next_ = Clock::now() + kEvery;
  }

 private:
  FunctionRef<bool()>* ask_;
  Clock::time_point next_;
};

struct FreePages {
  size_t bytes = 0;
  void operator()(void* p) const { pages_free(p, bytes); }
};

constexpr size_t kAlign = 64;  // of tensors and packed weights
constexpr size_t aligned(size_t x) { return (x + kAlign - 1) / kAlign * kAlign; }

class Engine {
 public:
  // Allocates nothing large. threads >= 1. context: most tokens of a state. prefill_rows: most rows of one pass.
  Engine(ProgramSpec spec, const Kernels& kernels, int threads, int64_t context, int64_t prefill_rows);
  ~Engine();

  const ProgramSpec& spec() const { return spec_; }
  const Kernels& kernels() const { return kernels_; }
  int threads() const { return pool_.threads(); }
  int64_t context() const { return context_; }
  size_t weight_bytes() const;
  // The most that the caches of a sequence hold while it grows to `tokens`, at most prefill_rows in a call.
  size_t kv_bytes(int64_t tokens) const {
    return KvCache::bytes_for(spec_.caches, spec_.windows, tokens, prefill_rows_);
  }
  // Working memory of a call with these symbols, of one state.
  size_t scratch_bytes(const std::vector<int64_t>& symbols, int64_t rows, int64_t past);

  // Packs the rows of a source into weight `weight`, row i as packed row dest[i].
  PackResult pack(int weight, const PackSource& source, const int64_t* dest);
  // All packed weights, one behind the other; null before the first `pack` or `use_packed`.
  const uint8_t* packed() const { return packed_; }
  size_t packed_size() const;
  // Uses packed_size() bytes at a multiple of 64, packed by an engine of the same program. The caller keeps them alive.
  void use_packed(const uint8_t* at);
  // Copies the `packed_size` bytes that `packed` of another engine of the same program gave into memory of its own.
  // `mapped`: they are those of a file, and their pages are released.
  void copy_packed(const uint8_t* from, bool mapped);
  // work(0) ... work(count - 1) by all threads, claimed in this order.
  void in_parallel(int64_t count, FunctionRef<void(int64_t)> work);

  struct Profile {
    std::vector<int64_t> nanoseconds;  // in each operation
    int64_t runs = 0;
  };
  // What was counted since the last call; `on`: whether to count from now on.
  Profile profile(bool on);

  std::unique_ptr<KvCache> new_cache() const {
    return std::make_unique<KvCache>(spec_.caches, context_, spec_.windows, slabs_);
  }

  // The shape of output `output` of a call.
  std::vector<int64_t> output_shape(const Call& call, size_t output) const;
  // Runs the calls in order; each state grows by its rows. outputs[o]: room for output o of all calls, one after
  // another. likeliest: room for the place of the largest of each row of logits, where `logits_output` is not -1.
  // `ask`, if there is one, is called by this thread every 50 ms of a long run, and while it waits for another thread's
  // run; where it returns true, Interrupted is thrown.
  void forward(std::vector<Call>& calls, const std::vector<void*>& outputs, int64_t* likeliest,
               FunctionRef<bool()>* ask);
  // The output that is the scores of a vocabulary, float32; -1 if the program decodes no tokens.
  int logits_output() const { return logits_output_; }

 private:
  struct Output {
    uint8_t* data;
    size_t at;
  };
  // Rows [first, first + rows) of one sequence of a call.
  struct CallRows {
    int call;
    int64_t sequence, first, rows, kept;
  };

  // engine.cpp
  void run_rows(std::vector<Call>& calls, std::vector<Output>& outputs);
  void run_alone(Call& call, std::vector<Output>& outputs);
  void run_together(const std::vector<Call>& calls, const std::vector<CallRows>& parts, std::vector<Output>& outputs);
  void execute(std::vector<Output>& outputs);
  void run_phases();
  void find_likeliest(const Tensor& logits, int64_t* places);
  // For the time of a forward: who runs it, and its poll.
  struct RunBy {
    Engine* engine;
    RunBy(Engine* e, Poll* poll) : engine(e) {
      engine->poll_ = poll;
      engine->runner_ = std::this_thread::get_id();
    }
    ~RunBy() {
      engine->runner_ = std::thread::id();
      engine->poll_ = nullptr;
    }
  };
  bool is_short(const std::vector<Call>& calls) const;
  std::unique_lock<std::timed_mutex> lock(FunctionRef<bool()>* ask);
  void make_weights();
  int root(int slot) const;
  void after_fork();
  void prepare_chunks(const std::vector<Call>& calls);

  // memory.cpp
  void prepare(const std::vector<int64_t>& symbols);
  void place();
  void set_shapes(Run& run, const std::vector<int64_t>& symbols) const;
  size_t lay_out(Run& run, std::vector<size_t>* offsets, std::vector<size_t>* temp, size_t* scratch) const;

  ProgramSpec spec_;
  Kernels kernels_;
  int64_t context_, prefill_rows_;
  const uint8_t* packed_ = nullptr;
  std::unique_ptr<uint8_t, FreePages> own_;  // where packed_ lies, if this engine packed
  const std::shared_ptr<KvSlabs> slabs_ = KvSlabs::make();
  std::map<size_t, size_t> chunk_sizes_;  // bytes of a chunk in a layer -> layers
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<std::pair<int, int>> phases_;  // (operation, its phase)
  std::vector<int> last_use_;                // by root slot: the last operation that touches it
  std::vector<int> direct_output_;           // by slot: the output whose memory the operation writes directly, -1
  int logits_output_ = -1;

  std::atomic<std::thread::id> runner_{};  // the thread in forward()
  std::timed_mutex mutex_;                 // guards everything below
  Poll* poll_ = nullptr;                   // of the run, if it is long
  int64_t* likeliest_ = nullptr;           // where the run writes the places of the next rows of logits
  std::vector<int64_t> found_;             // by part of the vocabulary, and row of logits: the place of the largest
  int64_t process_;
  ThreadPool pool_;
  WorkRanges ranges_;  // of the phase that runs
  Run run_;
  std::vector<int64_t> planned_;  // sizes and rows of segments for which run_ is laid out
  std::vector<size_t> offsets_, temp_;
  std::unique_ptr<uint8_t, void (*)(void*)> arena_;
  bool profiling_ = false;
  Profile profile_;
  size_t arena_bytes_ = 0, scratch_at_ = 0, scratch_bytes_ = 0;
};

}  // namespace edgeformer
