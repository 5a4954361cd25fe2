// Windows.
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <malloc.h>
#include <windows.h>

#include "platform/memory.h"
#include "platform/process.h"

namespace edgeformer {

void* aligned_new(size_t alignment, size_t bytes) { return _aligned_malloc(bytes ? bytes : 1, alignment); }

void aligned_delete(void* p) { _aligned_free(p); }

// Committed pages are zeroed and take no memory before their first use, though they count against the commit limit.
void* pages_alloc(size_t bytes) {
  return bytes ? VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE) : nullptr;
}

void pages_free(void* p, size_t) {
  if (p) VirtualFree(p, 0, MEM_RELEASE);
}

// Unlocking pages that are not locked takes them out of the working set (documented at VirtualUnlock).
void release_pages(const void* data, size_t bytes) {
  if (bytes) VirtualUnlock(const_cast<void*>(data), bytes);
}

void trim_heap() {}

int64_t process_id() { return static_cast<int64_t>(GetCurrentProcessId()); }

unsigned forks_seen() { return 0; }

void yield_core() { SwitchToThread(); }

}  // namespace edgeformer
#endif
