#include "platform/threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "platform/process.h"

namespace edgeformer {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(50);  // an idle worker spins so long, then sleeps: no CPU when idle
constexpr auto kYield = std::chrono::microseconds(5);  // from then on it yields the core between reads of the word
constexpr int kReads = 32;                             // reads of the claim word between reads of the clock

}  // namespace

// The claim word is phase << 32 | chunks left to claim. Phase numbers go on from run to run, so no word occurs twice
// (no ABA): a thread that slept between reading the word and its compare-and-swap fails if anything has changed, and a
// word with chunks left always belongs to an open phase. (32 bits of phases wrap after 4e9: no thread sleeps so long.)
struct ThreadPool::Impl {
  const int threads;
  const unsigned forks;  // forks_seen() when the workers started
  std::vector<std::thread> workers;
  std::mutex one_run;  // locked during a run

  // Written while no chunk is claimed, before the claim word that publishes them.
  FunctionRef<int64_t(int)>* begin = nullptr;
  FunctionRef<void(int, int64_t, int)>* work = nullptr;
  uint32_t first_phase = 0;
  uint32_t end_phase = 0;
  std::exception_ptr error;
  std::atomic<bool> failed{false};

  alignas(64) std::atomic<uint64_t> claim{0};
  std::atomic<int64_t> chunks{0};  // of the phase; stored before the word
  alignas(64) std::atomic<int64_t> finished{0};
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  std::mutex sleep_mutex;
  std::condition_variable wake;

  explicit Impl(int n) : threads(n), forks(forks_seen()) {
    try {
      for (int t = 1; t < n; t++) workers.emplace_back([this, t] { worker(t); });
    } catch (...) {
      shut_down();
      throw;
    }
  }

  ~Impl() { shut_down(); }

  void shut_down() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex);
      stop.store(true);
    }
    wake.notify_all();
    for (auto& w : workers) w.join();
    workers.clear();
  }

  void publish(uint64_t word) {
    claim.store(word);  // sequentially consistent with the sleepers' count: see wait()
    if (sleepers.load()) {
      {
        std::lock_guard<std::mutex> lock(sleep_mutex);
      }
      wake.notify_all();
    }
  }

  void keep_error() {
    // Only the first error is kept; `failed` makes the rest of the run empty.
    if (!failed.exchange(true)) error = std::current_exception();
  }

  // Opens `phase`, or the next one that is not empty. Called by one thread at a time: the last to finish a phase.
  void open(uint32_t phase) {
    for (; phase != end_phase; phase++) {
      int64_t count = 0;
      if (!failed.load(std::memory_order_relaxed)) {
        try {
          count = (*begin)(int(phase - first_phase));
        } catch (...) {
          keep_error();
        }
      }
      if (count > 0) {
        finished.store(0, std::memory_order_relaxed);
        chunks.store(count);
        return publish(uint64_t(phase) << 32 | uint64_t(count));
      }
    }
    publish(uint64_t(end_phase) << 32);  // no chunks: the run is over
  }

  // Claims and runs chunks while there are any; returns the word without chunks that it read last.
  uint64_t take_part(int thread) {
    uint64_t word = claim.load();
    while (word & 0xffffffffu) {
      if (!claim.compare_exchange_weak(word, word - 1)) continue;
      // The phase cannot end before this chunk does, so its published fields may be read now.
      const uint32_t phase = uint32_t(word >> 32);
      const int64_t total = chunks.load(std::memory_order_relaxed), next = total - int64_t(word & 0xffffffffu);
      if (!failed.load(std::memory_order_relaxed)) {
        try {
          (*work)(int(phase - first_phase), next, thread);
        } catch (...) {
          keep_error();
        }
      }
      if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 == total) open(phase + 1);
      word = claim.load();
    }
    return word;
  }

  // Waits until the claim word is no longer `word`, or until stop.
  void wait(uint64_t word) {
    const auto changed = [&] { return claim.load() != word || stop.load(std::memory_order_relaxed); };
    const auto start = Clock::now();
    for (auto now = start; now - start < kSpin; now = Clock::now()) {
      for (int i = 0; i < kReads; i++) {
        if (changed()) return;
        relax();
      }
      if (now - start > kYield) yield_core();
    }
    std::unique_lock<std::mutex> lock(sleep_mutex);
    sleepers.fetch_add(1);  // before the last read: either we see the new word, or its writer sees a sleeper
    wake.wait(lock, changed);
    sleepers.fetch_sub(1);
  }

  void worker(int thread) {
    while (true) {
      const uint64_t word = take_part(thread);
      if (stop.load()) return;
      wait(word);
    }
  }

  void run(int phases, FunctionRef<int64_t(int)> begin_phase, FunctionRef<void(int, int64_t, int)> do_work) {
    std::lock_guard<std::mutex> lock(one_run);
    begin = &begin_phase;
    work = &do_work;
    error = nullptr;
    failed.store(false);
    first_phase = uint32_t(claim.load() >> 32) + 1;
    end_phase = first_phase + uint32_t(phases);
    const uint64_t done = uint64_t(end_phase) << 32;
    open(first_phase);
    for (uint64_t word = take_part(0); word != done; word = take_part(0)) wait(word);
    if (error) std::rethrow_exception(error);
  }
};

ThreadPool::ThreadPool(int threads) {
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 or more");
  impl_ = new Impl(threads);
}

ThreadPool::~ThreadPool() {
  // In a child of fork() the workers do not exist and their handles cannot be joined: the pool is leaked.
  if (impl_.load()->forks == forks_seen()) delete impl_.load();
}

int ThreadPool::threads() const { return impl_.load()->threads; }

void ThreadPool::run(int phases, FunctionRef<int64_t(int)> begin, FunctionRef<void(int, int64_t, int)> work) {
  Impl* impl = impl_.load();
  if (impl->forks != forks_seen()) {
    // The old pool's locks and counters have the parent's state at the fork: never touch them again.
    Impl* fresh = new Impl(impl->threads);
    if (impl_.compare_exchange_strong(impl, fresh))
      impl = fresh;
    else
      delete fresh;  // another thread of the child was first: `impl` is its pool
  }
  impl->run(phases, begin, work);
}

}  // namespace edgeformer
