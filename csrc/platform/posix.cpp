// Linux and macOS.
#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#if defined(__GLIBC__)  // which the headers above define
#include <malloc.h>
#endif

#include "platform/memory.h"
#include "platform/process.h"

namespace edgeformer {
namespace {

#if defined(MADV_HUGEPAGE)
constexpr size_t kHugePage = size_t(2) << 20;
#else
constexpr size_t kHugePage = 0;
#endif

size_t page_size() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

size_t whole_pages(size_t bytes) { return (bytes + page_size() - 1) / page_size() * page_size(); }

}  // namespace

void* aligned_new(size_t alignment, size_t bytes) {
  void* p = nullptr;
  return posix_memalign(&p, alignment, bytes) ? nullptr : p;
}

void aligned_delete(void* p) { free(p); }

void* pages_alloc(size_t bytes) {
  // mmap gives zeroed pages that no one has touched. Map more, to start at a huge page, and unmap the rest.
  const bool huge = kHugePage && bytes >= kHugePage;
  const size_t size = whole_pages(bytes), spare = huge ? kHugePage : 0;
  if (size == 0) return nullptr;
  void* mapped = mmap(nullptr, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
  if (!huge) return mapped;
  uint8_t* start = static_cast<uint8_t*>(mapped);
  const size_t lead = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (lead) munmap(start, lead);
  if (spare - lead) munmap(start + lead + size, spare - lead);
  madvise(start + lead, size, MADV_HUGEPAGE);  // may fail: then the pages are small
  return start + lead;
#else
  return mapped;
#endif
}

void pages_free(void* p, size_t bytes) {
  if (p) munmap(p, whole_pages(bytes));
}

void release_pages([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)  // elsewhere MADV_DONTNEED is a hint that keeps the pages
  const uintptr_t page = page_size(), start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + page - 1) / page * page, end = (start + bytes) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
#endif
}

void trim_heap() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

int64_t process_id() { return getpid(); }

unsigned forks_seen() {
  static std::atomic<unsigned> forks{0};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  return forks.load();
}

void yield_core() { sched_yield(); }

}  // namespace edgeformer
#endif
