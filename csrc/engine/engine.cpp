#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

#include "platform/memory.h"
#include "platform/process.h"

namespace edgeformer {

Engine::Engine(ProgramSpec spec, const Kernels& kernels, int threads, int64_t context, int64_t prefill_rows)
    : spec_(std::move(spec)),
      kernels_(kernels),
      context_(context),
      prefill_rows_(prefill_rows),
      process_(process_id()),
      pool_(threads),
      ranges_(threads),
      arena_(nullptr, aligned_delete) {
  last_use_.assign(spec_.slots.size(), -1);
  for (size_t i = 0; i < spec_.ops.size(); ++i) {
    ops_.push_back(make_op(static_cast<int>(i), spec_.ops[i]));
    for (int p = 0; p < ops_.back()->phases(); ++p) phases_.emplace_back(i, p);
    for (const auto* slots : {&spec_.ops[i].inputs, &spec_.ops[i].outputs}) {
      for (int s : *slots) {
        if (s >= 0) last_use_[root(s)] = static_cast<int>(i);
      }
    }
  }
  const int end = static_cast<int>(spec_.ops.size());
  direct_output_.assign(spec_.slots.size(), -1);
  std::vector<bool> written(spec_.slots.size(), false);
  for (const OpSpec& op : spec_.ops) {
    for (int s : op.outputs) {
      if (s >= 0) written[s] = true;
    }
  }
  for (size_t o = 0; o < spec_.outputs.size(); ++o) {
    const int r = root(spec_.outputs[o]);
    last_use_[r] = end;
    if (written[r] && direct_output_[r] < 0) direct_output_[r] = static_cast<int>(o);
    const SlotSpec& slot = spec_.slots[spec_.outputs[o]];
    if (slot.name == "logits" && slot.dtype == DType::f32 && !slot.shape.empty() && !spec_.caches.empty())
      logits_output_ = static_cast<int>(o);
  }
  for (const KvLayout& l : spec_.caches) ++chunk_sizes_[size_t(l.chunk_bytes())];
  run_.k = &kernels_;
  run_.spec = &spec_;
  run_.threads = pool_.threads();
  run_.tensors.resize(spec_.slots.size());
  run_.sizes.resize(spec_.sizes.size());
  run_.plans.resize(spec_.ops.size());
  run_.temp.resize(spec_.ops.size());
  run_.scratch.resize(run_.threads);
  run_.weights.resize(spec_.weights.size());
}

Engine::~Engine() = default;

int Engine::root(int slot) const {
  while (spec_.slots[slot].view_of >= 0) slot = spec_.slots[slot].view_of;
  return slot;
}

size_t Engine::weight_bytes() const {
  size_t total = 0;
  for (const WeightSpec& w : spec_.weights) total += packed_bytes(w.type, w.n, w.k);
  return total;
}

PackResult Engine::pack(int weight, const PackSource& source, const int64_t* dest) {
  const WeightSpec& w = spec_.weights[weight];
  {
    const std::lock_guard<std::timed_mutex> lock(mutex_);
    if (!packed_) make_weights();
  }
  return pack_rows(w.type, source, 0, source.n, dest, const_cast<void*>(run_.weights[weight]));
}

size_t Engine::packed_size() const {
  size_t total = 0;
  for (const WeightSpec& w : spec_.weights) total += aligned(packed_bytes(w.type, w.n, w.k));
  return total;
}

// One allocation for all: most weights are smaller than a huge page.
void Engine::make_weights() {
  const size_t total = packed_size();
  void* p = pages_alloc(total);
  if (!p) throw std::bad_alloc();
  own_ = {static_cast<uint8_t*>(p), FreePages{total}};
  use_packed(own_.get());
}

void Engine::use_packed(const uint8_t* at) {
  packed_ = at;
  for (size_t i = 0; i < spec_.weights.size(); ++i) {
    const WeightSpec& w = spec_.weights[i];
    run_.weights[i] = at;
    at += aligned(packed_bytes(w.type, w.n, w.k));
  }
}

void Engine::copy_packed(const uint8_t* from, bool mapped) {
  make_weights();
  constexpr size_t kPiece = size_t(2) << 20;
  const size_t total = packed_size();
  auto copy = [&](int64_t i) {
    const size_t at = static_cast<size_t>(i) * kPiece;
    const size_t bytes = std::min(kPiece, total - at);
    std::memcpy(own_.get() + at, from + at, bytes);
    if (mapped) release_pages(from + at, bytes);
  };
  in_parallel(static_cast<int64_t>((total + kPiece - 1) / kPiece), copy);
}

void Engine::in_parallel(int64_t count, FunctionRef<void(int64_t)> work) {
  auto begin = [count](int) { return count; };
  auto chunk = [&work](int, int64_t i, int) { work(i); };
  pool_.run(1, begin, chunk);
}

void Engine::execute(std::vector<Output>& outputs) {
  for (size_t s = 0; s < spec_.slots.size(); ++s) {
    if (direct_output_[s] >= 0) {
      const Output& o = outputs[direct_output_[s]];
      run_.tensors[s].data = o.data + o.at;
    }
  }
  for (size_t s = 0; s < spec_.slots.size(); ++s) {
    if (spec_.slots[s].view_of >= 0) run_.tensors[s].data = run_.tensors[root(static_cast<int>(s))].data;
  }
  run_phases();
  if (logits_output_ >= 0) {
    const Tensor& logits = run_.tensors[spec_.outputs[logits_output_]];
    find_likeliest(logits, likeliest_);
    likeliest_ += logits.rows();
  }
  for (size_t o = 0; o < outputs.size(); ++o) {
    const Tensor& t = run_.tensors[spec_.outputs[o]];
    const size_t bytes = t.bytes();
    if (direct_output_[root(spec_.outputs[o])] != static_cast<int>(o) && bytes) {
      std::memcpy(outputs[o].data + outputs[o].at, t.data, bytes);
    }
    outputs[o].at += bytes;
  }
}

// Each thread looks at the part of the columns that it has most likely just written: it is still in its cache.
void Engine::find_likeliest(const Tensor& logits, int64_t* places) {
  const int64_t rows = logits.rows(), columns = logits.columns(), parts = std::min<int64_t>(run_.threads, columns);
  const auto first = [&](int64_t part) { return columns * part / parts; };
  found_.resize(static_cast<size_t>(rows * parts));
  auto begin = [&](int) { return ranges_.divide(rows * parts); };
  auto work = [&](int, int64_t, int thread) {
    for (int64_t i; (i = ranges_.take(thread)) >= 0;) {
      const int64_t part = i / rows, at = first(part);
      found_[i] = at + kernels_.place_of_largest(logits.f32() + i % rows * columns + at, first(part + 1) - at);
    }
  };
  pool_.run(1, begin, work);
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = logits.f32() + row * columns;
    int64_t best = found_[row];
    for (int64_t part = 1; part < parts && x[best] == x[best]; ++part) {
      const int64_t other = found_[part * rows + row];
      if (!(x[other] <= x[best])) best = other;  // larger, or NaN
    }
    places[row] = best;
  }
}

void Engine::run_phases() {
  auto start = [this](int p) { return ranges_.divide(ops_[phases_[p].first]->begin(run_, phases_[p].second)); };
  auto work = [this](int p, int64_t, int thread) {
    for (int64_t chunk; (chunk = ranges_.take(thread)) >= 0;) {
      if (thread == 0 && poll_) (*poll_)();
      ops_[phases_[p].first]->work(run_, phases_[p].second, chunk, thread);
    }
  };
  const int phases = static_cast<int>(phases_.size());
  if (!profiling_) return pool_.run(phases, start, work);
  // begin(p) runs between two phases: the time since the last one belongs to phase p - 1.
  Clock::time_point last = Clock::now();
  const auto lap = [&](int phase) {
    const Clock::time_point now = Clock::now();
    if (phase >= 0) {
      profile_.nanoseconds[phases_[phase].first] +=
          std::chrono::duration_cast<std::chrono::nanoseconds>(now - last).count();
    }
    last = now;
  };
  auto begin = [&](int p) -> int64_t {
    lap(p - 1);
    return start(p);
  };
  pool_.run(phases, begin, work);
  lap(phases - 1);
  ++profile_.runs;
}

Engine::Profile Engine::profile(bool on) {
  after_fork();
  const std::lock_guard<std::timed_mutex> lock(mutex_);
  Profile seen = std::move(profile_);
  profile_ = {std::vector<int64_t>(spec_.ops.size(), 0), 0};
  profiling_ = on;
  return seen;
}

// In a child of fork() a thread of the parent may have held the mutex, and no longer exists.
void Engine::after_fork() {
  if (process_id() == process_) return;
  new (&mutex_) std::timed_mutex;
  runner_ = std::thread::id();
  slabs_->after_fork();
  process_ = process_id();
}

// Memory for the next chunk of the sequences that come to the end of one: the last kAhead steps before share the work.
void Engine::prepare_chunks(const std::vector<Call>& calls) {
  constexpr int64_t kAhead = 64;
  size_t soon = 0;
  for (const Call& c : calls)
    for (const auto& cache : c.state->caches) soon += cache->length() % kChunkTokens >= kChunkTokens - kAhead;
  if (soon == 0) return;
  for (const auto& [bytes, layers] : chunk_sizes_)
    ChunkMemory::prepare(*slabs_, bytes, soon * layers, (soon * layers + kAhead / 2 - 1) / (kAhead / 2));
}

// Rows of any states as one sequence: all operations but attention compute a row from that row alone, and attention
// reads the segments.
void Engine::run_together(const std::vector<Call>& calls, const std::vector<CallRows>& parts,
                          std::vector<Output>& outputs) {
  int64_t rows = 0, kept = 0;
  run_.segments.clear();
  for (const CallRows& p : parts) {
    State& state = *calls[p.call].state;
    KvCache* cache = spec_.caches.empty() ? nullptr : state.caches[p.sequence].get();
    if (cache) cache->reserve(p.rows);
    run_.segments.push_back({cache, rows, p.rows, cache ? cache->length() : 0, p.kept});
    rows += p.rows;
    kept += p.kept;
  }
  std::vector<int64_t> symbols = calls[parts[0].call].symbols;
  symbols[spec_.batch_symbol] = 1;
  symbols[spec_.sequence_symbol] = rows;
  symbols[spec_.kept_symbol] = kept;
  prepare(symbols);
  for (size_t i = 0; i < spec_.inputs.size(); ++i) {
    Tensor& t = run_.tensors[spec_.inputs[i]];
    if (t.rank == 0) {
      std::memcpy(t.data, calls[0].inputs[i], t.bytes());
      continue;
    }
    const size_t row_bytes = rows ? t.bytes() / rows : 0;
    uint8_t* to = static_cast<uint8_t*>(t.data);
    for (const CallRows& p : parts) {
      const Call& c = calls[p.call];
      const uint8_t* from = static_cast<const uint8_t*>(c.inputs[i]) + (p.sequence * c.rows + p.first) * row_bytes;
      std::memcpy(to, from, p.rows * row_bytes);
      to += p.rows * row_bytes;
    }
  }
  execute(outputs);
  for (const Segment& s : run_.segments) {
    if (s.cache) s.cache->advance(s.rows);
  }
}

void Engine::run_rows(std::vector<Call>& calls, std::vector<Output>& outputs) {
  std::vector<CallRows> parts;
  int64_t room = prefill_rows_;
  const auto flush = [&] {
    if (!parts.empty()) run_together(calls, parts, outputs);
    parts.clear();
    room = prefill_rows_;
  };
  // Without a cache a sequence cannot be cut: its rows would not see each other.
  const bool can_cut = !spec_.caches.empty();
  for (size_t c = 0; c < calls.size(); ++c) {
    const Call& call = calls[c];
    const int64_t kept = call.kept();
    for (int64_t b = 0; b < call.batch; ++b) {
      int64_t first = 0;
      while (first < call.rows) {
        if (room == 0 || (!can_cut && room < call.rows)) flush();
        const int64_t rows = can_cut ? std::min(room, call.rows - first) : call.rows;
        const int64_t last_kept = std::max<int64_t>(0, first + rows - (call.rows - kept));
        parts.push_back({static_cast<int>(c), b, first, rows, std::min(rows, last_kept)});
        first += rows;
        room = std::max<int64_t>(0, room - rows);
      }
    }
  }
  flush();
}

void Engine::run_alone(Call& call, std::vector<Output>& outputs) {
  run_.segments.clear();
  const int64_t kept = call.kept();
  for (int64_t b = 0; b < call.batch; ++b) {
    KvCache* cache = spec_.caches.empty() ? nullptr : call.state->caches[b].get();
    if (cache) cache->reserve(call.rows);
    run_.segments.push_back({cache, b * call.rows, call.rows, cache ? cache->length() : 0, kept});
  }
  prepare(call.symbols);
  for (size_t i = 0; i < spec_.inputs.size(); ++i) {
    Tensor& t = run_.tensors[spec_.inputs[i]];
    if (t.count) std::memcpy(t.data, call.inputs[i], t.bytes());
  }
  execute(outputs);
  for (const Segment& s : run_.segments) {
    if (s.cache) s.cache->advance(s.rows);
  }
}

std::vector<int64_t> Engine::output_shape(const Call& call, size_t output) const {
  std::vector<int64_t> shape;
  for (int s : spec_.slots[spec_.outputs[output]].shape) shape.push_back(spec_.sizes[s].evaluate(call.symbols));
  return shape;
}

// Whether a run is at most about a decoding step of a few sequences: reading the clock would cost something there, and
// the caller looks for signals after it anyhow.
bool Engine::is_short(const std::vector<Call>& calls) const {
  constexpr int64_t kShortRows = 16;
  if (spec_.batch_symbol < 0) return false;
  int64_t rows = 0;
  for (const Call& c : calls) rows += c.batch * c.rows;
  return rows <= kShortRows;
}

std::unique_lock<std::timed_mutex> Engine::lock(FunctionRef<bool()>* ask) {
  if (runner_.load() == std::this_thread::get_id()) throw Reentered();
  if (!ask) return std::unique_lock<std::timed_mutex>(mutex_);
  std::unique_lock<std::timed_mutex> held(mutex_, std::try_to_lock);
  while (!held.owns_lock()) {
    if (!held.try_lock_for(Poll::kEvery) && (*ask)()) throw Interrupted();
  }
  return held;
}

void Engine::forward(std::vector<Call>& calls, const std::vector<void*>& memory, int64_t* likeliest,
                     FunctionRef<bool()>* ask) {
  after_fork();
  const std::unique_lock<std::timed_mutex> held = lock(ask);
  Poll poll(ask);
  const RunBy run_by(this, ask && !is_short(calls) ? &poll : nullptr);
  likeliest_ = likeliest;
  std::vector<Output> outputs;
  for (void* p : memory) outputs.push_back({static_cast<uint8_t*>(p), 0});
  std::vector<int64_t> lengths;
  for (Call& c : calls) {
    lengths.push_back(c.state->length());
    if (spec_.caches.empty()) continue;
    c.state->caches.resize(c.batch);
    for (auto& cache : c.state->caches) {
      if (!cache) cache = new_cache();
    }
  }
  try {
    if (spec_.row_local) {
      run_rows(calls, outputs);
    } else {
      for (Call& c : calls) run_alone(c, outputs);
    }
  } catch (...) {
    for (size_t i = 0; i < calls.size(); ++i) {
      for (auto& cache : calls[i].state->caches) {
        if (cache->length() > lengths[i]) cache->truncate(lengths[i]);
      }
    }
    throw;
  }
  for (const Call& c : calls) {
    for (auto& cache : c.state->caches) cache->release_unseen();
  }
  prepare_chunks(calls);
}

}  // namespace edgeformer
