// The tasks of a phase, divided among threads so that locality and balance go together.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace edgeformer {

// Each thread has a share of neighbouring tasks, the same part of the whole in every phase: rows that a thread reads
// are then mostly rows that it wrote, in the caches near it. Cores whose caches are far apart (two chiplets) lose a
// third of their speed otherwise. Whoever is through with its share takes from the others'.
class Shares {
 public:
  explicit Shares(int threads) : threads_(threads), shares_(new Share[static_cast<size_t>(threads)]) {}

  // Before a phase, while nobody takes. Returns how many threads have something to do.
  int64_t divide(int64_t tasks) {
    for (int t = 0; t < threads_; ++t) {
      shares_[t].next.store(tasks * t / threads_, std::memory_order_relaxed);
      shares_[t].end = tasks * (t + 1) / threads_;
    }
    return std::min<int64_t>(tasks, threads_);
  }

  // A task that nobody has taken, -1 when there is none.
  int64_t take(int thread) {
    for (int i = 0; i < threads_; ++i) {
      Share& share = shares_[(thread + i) % threads_];
      if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
      const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
      if (task < share.end) return task;
    }
    return -1;
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  int threads_;
  std::unique_ptr<Share[]> shares_;
};

}  // namespace edgeformer
