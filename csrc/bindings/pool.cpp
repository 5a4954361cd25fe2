// edgeformer._native.testing: the thread pool, its work-stealing ranges, and the speed at which it reads memory.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "bindings/bindings.h"
#include "platform/memory.h"
#include "platform/threads.h"
#include "platform/work_ranges.h"

namespace edgeformer {
namespace {

// Order of events of a pool's run: what each phase's begin and work saw.
std::vector<int64_t> pool_counts(ThreadPool& pool, int phases, int64_t chunks, int64_t spin) {
  // Each begin checks that the phase before has done all its chunks; each work adds to its own chunk's counter.
  std::vector<int64_t> done(size_t(phases) * size_t(chunks), 0), seen(size_t(phases), -1);
  auto begin = [&](int p) -> int64_t {
    int64_t sum = 0;
    if (p > 0)
      for (int64_t c = 0; c < chunks; c++) sum += done[size_t((p - 1) * chunks + c)];
    seen[size_t(p)] = sum;
    return p % 7 == 3 ? 0 : chunks - p % 3;  // also empty phases, and phases of other sizes
  };
  auto work = [&](int p, int64_t c, int) {
    volatile int64_t sink = 0;
    for (int64_t i = 0; i < spin; i++) sink = sink + i;
    done[size_t(p * chunks + c)] += 1;
  };
  py::gil_scoped_release unlocked;
  pool.run(phases, begin, work);
  return seen;
}

double pool_seconds(ThreadPool& pool, int runs, int phases, int64_t chunks, int64_t spin) {
  auto begin = [&](int) -> int64_t { return chunks; };
  auto work = [&](int, int64_t, int) {
    volatile int64_t sink = 0;
    for (int64_t i = 0; i < spin; i++) sink = sink + i;
  };
  py::gil_scoped_release unlocked;
  const auto start = std::chrono::steady_clock::now();
  for (int r = 0; r < runs; r++) pool.run(phases, begin, work);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void pool_throw(ThreadPool& pool, int phases, int64_t chunks, int bad_phase, bool in_begin) {
  auto begin = [&](int p) -> int64_t {
    if (in_begin && p == bad_phase) throw std::runtime_error("begin failed");
    return chunks;
  };
  auto work = [&](int p, int64_t c, int) {
    if (!in_begin && p == bad_phase && c == chunks / 2) throw std::runtime_error("work failed");
  };
  py::gil_scoped_release unlocked;
  pool.run(phases, begin, work);
}

// Seconds to read `bytes` once, in order, on a pool: the limit that decoding is compared with. The best of four rounds
// that prefetch and four that leave it to the CPU: which is faster depends on its maker.
double memory_read(int threads, size_t bytes) {
  ThreadPool pool(threads);
  const size_t part = size_t(1) << 17;
  bytes = (bytes + part - 1) / part * part;
  auto* data = static_cast<uint64_t*>(pages_alloc(bytes));
  if (!data) throw std::bad_alloc();
  std::memset(data, 1, bytes);
  std::vector<uint64_t> sums(size_t(threads) * 8);
  auto begin = [&](int) -> int64_t { return int64_t(bytes / part); };
  bool prefetch = false;
  auto work = [&](int, int64_t c, int thread) {
    const uint64_t* p = data + size_t(c) * part / 8;
    uint64_t sum = 0;
    for (size_t i = 0; i < part / 8; i += 8) {
      if (prefetch) __builtin_prefetch(p + i + 512, 0, 2);
      for (size_t j = 0; j < 8; j++) sum += p[i + j];
    }
    sums[size_t(thread) * 8] += sum;
  };
  py::gil_scoped_release unlocked;
  double best = 1e30;
  for (int round = 0; round < 8; round++) {
    prefetch = round % 2;
    const auto start = std::chrono::steady_clock::now();
    pool.run(1, begin, work);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  pages_free(data, bytes);
  return best;
}

}  // namespace

void bind_pool(py::module_& m) {
  m.def("memory_read", &memory_read, py::arg("threads"), py::arg("size"));
  py::class_<ThreadPool>(m, "ThreadPool")
      .def(py::init<int>())
      .def_property_readonly("threads", &ThreadPool::threads)
      .def("counts", &pool_counts)
      .def("seconds", &pool_seconds)
      .def("throw", &pool_throw);
  py::class_<WorkRanges>(m, "WorkRanges")
      .def(py::init<int>())
      .def("divide", &WorkRanges::divide, py::arg("tasks"))
      .def("take", &WorkRanges::take, py::arg("thread"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace edgeformer
