// Work-stealing ranges: the tasks of one phase, divided among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace edgeformer {

// Each thread owns one range of neighbouring tasks, the same part of the whole in every phase: so it reads mostly rows
// that it wrote, from caches near it. (Cores with distant caches, as on two chiplets, lose a third of their speed
// otherwise.) A thread that has finished its own range takes tasks from the ranges of the others.
class WorkRanges {
 public:
  explicit WorkRanges(int threads) : threads_(threads), ranges_(new Range[static_cast<size_t>(threads)]) {}

  // Divides the tasks 0 .. tasks - 1 into ranges of equal size (to one task), thread t's at tasks * t / threads. Only
  // between phases, while no thread calls take. Returns the number of threads that have tasks.
  int64_t divide(int64_t tasks) {
    for (int t = 0; t < threads_; ++t) {
      ranges_[t].next.store(tasks * t / threads_, std::memory_order_relaxed);
      ranges_[t].end = tasks * (t + 1) / threads_;
    }
    return std::min<int64_t>(tasks, threads_);
  }

  // A task that no thread has taken yet: the next one of this thread's range, else of thread + 1's, thread + 2's, ...
  // Returns -1 when there is none. Each task is returned once.
  int64_t take(int thread) {
    for (int i = 0; i < threads_; ++i) {
      Range& range = ranges_[(thread + i) % threads_];
      if (range.next.load(std::memory_order_relaxed) >= range.end) continue;
      const int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
      if (task < range.end) return task;
    }
    return -1;
  }

 private:
  struct alignas(64) Range {  // a cache line each: no false sharing
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  int threads_;
  std::unique_ptr<Range[]> ranges_;
};

}  // namespace edgeformer
