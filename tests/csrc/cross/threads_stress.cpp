// Stress of the pool for ThreadSanitizer: exits 0 where every chunk ran once and in its phase. Usage: threads_stress
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "platform/threads.h"

using edgeformer::ThreadPool;

namespace {

// Plain (not atomic) memory crosses every boundary: phase to phase, begin to work, run to run, caller to caller.
bool phases(ThreadPool& pool, int count, int64_t chunks) {
  std::vector<int64_t> value(size_t(chunks), 0);
  int64_t serial = 0;
  bool good = true;
  auto begin = [&](int p) -> int64_t {
    for (int64_t c = 0; c < chunks; c++) good = good && value[size_t(c)] == p;
    serial = p;
    return chunks;
  };
  auto work = [&](int p, int64_t c, int) {
    if (serial != p) good = false;
    value[size_t((c + p) % chunks)] += 1;  // another thread's element of the phase before
  };
  pool.run(count, begin, work);
  for (const int64_t v : value) good = good && v == count;
  return good;
}

bool failure(ThreadPool& pool) {
  auto begin = [](int) -> int64_t { return 8; };
  auto work = [](int p, int64_t c, int) {
    if (p == 3 && c > 4) throw std::runtime_error("on purpose");
  };
  try {
    pool.run(5, begin, work);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  std::atomic<bool> good{true};
  for (const int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 20; round++) good = good && phases(pool, 40, 1 + round % 9) && failure(pool);
    std::vector<std::thread> callers;
    for (int t = 0; t < 3; t++)
      callers.emplace_back([&] {
        for (int round = 0; round < 10; round++)
          if (!phases(pool, 10, 4)) good = false;
      });
    for (auto& caller : callers) caller.join();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the workers sleep now; wake them once more
    good = good && phases(pool, 3, 6);
  }
  for (int i = 0; i < 20; i++) ThreadPool pool(3);
  std::puts(good ? "good" : "WRONG");
  return good ? 0 : 1;
}
