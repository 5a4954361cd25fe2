// The process and its place on the cores, as the operating system sees them.
#pragma once

#include <cstdint>

namespace edgeformer {

// The number of this process; another one in a child of fork().
int64_t process_id();

// fork() calls between the process of the first call of this function and this process: a change tells a child that
// the parent's threads do not exist here. Always 0 on Windows, which has no fork().
unsigned forks_seen();

// Gives the core to another thread that waits for one.
void yield_core();

// Tells the core that this thread spins: it takes less power, and leaves its sibling thread more of the core.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace edgeformer
