// Threads take all tasks of work-stealing ranges of random sizes. Prints "good", or the first task that did not run once.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "platform/work_ranges.h"

int main() {
  std::mt19937 random(7);
  for (const int threads : {1, 2, 3, 5, 8}) {
    edgeformer::WorkRanges ranges(threads);
    for (int phase = 0; phase < 60; phase++) {  // the same object in every phase, as in the engine
      const int64_t tasks = int64_t(random() % (phase % 3 ? 40 : 5000));
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      ranges.divide(tasks);
      const int idle = int(random() % unsigned(threads));  // some phases: that many threads never arrive
      std::vector<std::thread> team;
      for (int t = idle; t < threads; t++)
        team.emplace_back([&, t] {
          for (int64_t task; (task = ranges.take(t)) >= 0;) runs[size_t(task)].fetch_add(1, std::memory_order_relaxed);
        });
      for (auto& thread : team) thread.join();
      for (int64_t task = 0; task < tasks; task++) {
        if (const int count = runs[size_t(task)].load(); count != 1) {
          std::printf("task %lld of %lld ran %d times, %d threads\n", static_cast<long long>(task),
                      static_cast<long long>(tasks), count, threads);
          return 1;
        }
      }
    }
  }
  std::puts("good");
}
