// Memory as the operating system gives it: aligned blocks, zeroed pages, pages of a mapped file.
#pragma once

#include <cstddef>

namespace edgeformer {

// `bytes` at a multiple of `alignment` (a power of two, sizeof(void*) or more); null if there is no memory. Not zeroed.
void* aligned_new(size_t alignment, size_t bytes);
// p may be null.
void aligned_delete(void* p);

// Zeroed memory, 64-byte aligned; null if there is none. No page is touched before its first use. Linux: 2 MiB or more
// are aligned to 2 MiB, with a request for huge pages. (Windows needs a privilege for them, macOS on arm64 has none.)
void* pages_alloc(size_t bytes);
// `bytes` as given to pages_alloc; p may be null.
void pages_free(void* p, size_t bytes);

// Returns the whole pages among these bytes of a mapped file to the system; a later reader gets them from the file.
// Where the system has no such call, nothing happens.
void release_pages(const void* data, size_t bytes);
// Returns freed memory of the C library's heap to the system, where its heap keeps it (glibc).
void trim_heap();

}  // namespace edgeformer
