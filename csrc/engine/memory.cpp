// Sizes and memory of a run: shapes from symbols, and places for all tensors in one arena.
#include <algorithm>
#include <new>

#include "engine/engine.h"

namespace edgeformer {

void Engine::set_shapes(Run& run, const std::vector<int64_t>& symbols) const {
  for (size_t i = 0; i < spec_.sizes.size(); ++i) run.sizes[i] = spec_.sizes[i].evaluate(symbols);
  for (size_t i = 0; i < spec_.slots.size(); ++i) {
    const SlotSpec& s = spec_.slots[i];
    Tensor& t = run.tensors[i];
    t.dtype = s.dtype;
    t.rank = static_cast<int>(s.shape.size());
    t.count = 1;
    for (int a = 0; a < t.rank; ++a) {
      t.shape[a] = run.sizes[s.shape[a]];
      if (t.shape[a] < 0) {
        throw InputProblem("the inputs' sizes leave " + s.name + " with a negative size");
      }
      t.count *= t.shape[a];
    }
    if (s.is_constant) t.data = const_cast<uint8_t*>(s.constant.data());
  }
}

// First-fit places in the arena for all slots that are no constant, and for the operations' temp; returns its size.
size_t Engine::lay_out(Run& run, std::vector<size_t>* offsets, std::vector<size_t>* temp, size_t* scratch) const {
  struct Block {
    size_t at, bytes;
    int until;
  };
  std::vector<Block> live;  // sorted by place
  size_t total = 0;
  const auto take = [&](size_t bytes, int now, int until) {
    bytes = aligned(bytes);
    live.erase(std::remove_if(live.begin(), live.end(), [now](const Block& b) { return b.until < now; }), live.end());
    size_t at = 0;
    auto where = live.begin();
    for (; where != live.end() && where->at < at + bytes; ++where) at = where->at + where->bytes;
    live.insert(where, {at, bytes, until});
    total = std::max(total, at + bytes);
    return at;
  };
  offsets->assign(spec_.slots.size(), 0);
  temp->assign(spec_.ops.size(), 0);
  *scratch = 0;
  for (int s : spec_.inputs) (*offsets)[s] = take(run.tensors[s].bytes(), -1, last_use_[s]);
  for (size_t i = 0; i < spec_.ops.size(); ++i) {
    const int now = static_cast<int>(i);
    for (int s : spec_.ops[i].outputs) {
      if (s >= 0 && direct_output_[s] < 0) (*offsets)[s] = take(run.tensors[s].bytes(), now, last_use_[s]);
    }
    (*temp)[i] = take(ops_[i]->temp_bytes(run), now, now);
    *scratch = std::max(*scratch, aligned(ops_[i]->scratch_bytes(run)));
  }
  return total;
}

size_t Engine::scratch_bytes(const std::vector<int64_t>& symbols, int64_t rows, int64_t past) {
  Run run;
  run.k = &kernels_;
  run.spec = &spec_;
  run.threads = pool_.threads();
  run.sizes.resize(spec_.sizes.size());
  run.tensors.resize(spec_.slots.size());
  KvCache none(spec_.caches, context_);
  run.segments = {{&none, 0, rows, past, 1}};
  set_shapes(run, symbols);
  std::vector<size_t> offsets, temp;
  size_t scratch = 0;
  const size_t arena = lay_out(run, &offsets, &temp, &scratch);
  return arena + scratch * run.threads;
}

// Sizes and memory for a run with these symbols; nothing is allocated when the last run had the same sizes.
void Engine::prepare(const std::vector<int64_t>& symbols) {
  set_shapes(run_, symbols);
  std::vector<int64_t> key = run_.sizes;
  for (const Segment& s : run_.segments) key.push_back(s.rows);
  if (key == planned_) return place();
  planned_.clear();
  const size_t bytes = lay_out(run_, &offsets_, &temp_, &scratch_bytes_);
  const size_t wanted = bytes + scratch_bytes_ * run_.threads;
  constexpr size_t kWorthFreeing = 8 << 20;
  if (wanted > arena_bytes_ || (arena_bytes_ > kWorthFreeing && wanted < arena_bytes_ / 8)) {
    arena_.reset();
    arena_bytes_ = 0;
    arena_.reset(static_cast<uint8_t*>(aligned_new(kAlign, std::max<size_t>(wanted, kAlign))));
    if (!arena_) throw std::bad_alloc();
    arena_bytes_ = wanted;
  }
  scratch_at_ = bytes;
  planned_ = std::move(key);
  place();
}

void Engine::place() {
  for (size_t s = 0; s < spec_.slots.size(); ++s) {
    if (!spec_.slots[s].is_constant) run_.tensors[s].data = arena_.get() + offsets_[s];
  }
  for (size_t i = 0; i < spec_.ops.size(); ++i) run_.temp[i] = arena_.get() + temp_[i];
  for (int t = 0; t < run_.threads; ++t) run_.scratch[t] = arena_.get() + scratch_at_ + scratch_bytes_ * t;
}

}  // namespace edgeformer
