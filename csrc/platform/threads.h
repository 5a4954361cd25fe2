// A small pool: phases in order, chunks claimed dynamically, a short spin and then sleep.
#pragma once

#include <atomic>
#include <cstdint>

namespace edgeformer {

// A reference to a callable; it must outlive the call it is passed to.
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
  // `threads` >= 1 take part in a run, the calling thread included; threads - 1 workers are started now.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // For p = 0 .. phases - 1: chunks = begin(p), then work(p, chunk, thread) for chunk = 0 .. chunks - 1 (chunks <
  // 2^32).
  //  - begin(p) runs once, on the thread that finished phase p - 1 (the caller for p = 0), after all of phase p - 1 and
  //    before all of phase p: it sees all their writes. Small serial work belongs there; it may return 0.
  //  - work(p, chunk, thread): `thread` in 0 .. threads - 1 is this thread's own index for the whole run, 0 the caller.
  //  - Chunks are claimed one by one, in order. Nobody waits for a thread that holds no chunk.
  // Both are called as lvalues: auto begin = [&](int p) -> int64_t {...}; auto work = [&](int p, int64_t c, int t)
  // {...}; One run at a time; other callers wait their turn. Not from inside begin or work. An exception thrown by
  // either ends the run (what is already claimed finishes) and is rethrown here. After fork() the child starts workers
  // of its own.
  void run(int phases, FunctionRef<int64_t(int)> begin, FunctionRef<void(int, int64_t, int)> work);

 private:
  struct Impl;
  std::atomic<Impl*> impl_;  // replaced once in a child of fork()
};

}  // namespace edgeformer
