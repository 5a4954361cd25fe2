// A small thread pool: phases in order, chunks claimed one by one; an idle worker spins for a moment, then sleeps.
#pragma once

#include <atomic>
#include <cstdint>

namespace edgeformer {

// A reference to a callable, which must outlive the call that it is passed to.
template <class Signature>
class FunctionRef;
template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  template <class F>
  FunctionRef(F& f)  // NOLINT: implicit on purpose, callers pass lambdas
      : object_(&f), call_([](void* o, Args... args) -> R { return (*static_cast<F*>(o))(args...); }) {}
  R operator()(Args... args) const { return call_(object_, args...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

class ThreadPool {
 public:
  // threads >= 1: those that take part in a run, the calling thread included. Starts threads - 1 workers.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Runs the phases p = 0 .. phases - 1 in order: chunks = begin(p), then work(p, chunk, thread) for every chunk.
  //
  //   begin(p) -> chunks       Called once, after all work of phase p - 1 and before any of phase p; it sees the writes
  //                            of all threads. Runs on the thread that finished phase p - 1 (p = 0: on the caller).
  //                            0 <= chunks < 2^32. The place for serial work too small for a barrier.
  //   work(p, chunk, thread)   Called once for each chunk in 0 .. chunks - 1. Chunks are claimed one by one, ascending.
  //                            thread: the index of this thread in 0 .. threads - 1, the same in the whole run;
  //                            the caller is 0.
  //
  //   barriers     A phase ends when its last chunk does; a thread that has claimed no chunk delays nobody.
  //   lvalues      auto begin = [&](int p) -> int64_t {...};
  //                auto work = [&](int p, int64_t chunk, int thread) {...};
  //   callers      One run at a time; other callers wait. Never call run from begin or work.
  //   exceptions   The first one ends the run (claimed chunks finish) and is rethrown here.
  //   fork         The first run in a child process starts new workers.
  void run(int phases, FunctionRef<int64_t(int)> begin, FunctionRef<void(int, int64_t, int)> work);

 private:
  struct Impl;
  std::atomic<Impl*> impl_;  // a child of fork() replaces it once
};

}  // namespace edgeformer
