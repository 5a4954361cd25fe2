// Stress of shared KV chunks for ThreadSanitizer: caches of several threads fork, append and end, while another thread
// prepares memory for their next chunks. Usage: chunks_stress
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "program/kv_cache.h"

using namespace edgeformer;  // NOLINT

namespace {

const KvLayout kLayout = {KvType::float32, 1, 4, 4};

uint8_t byte_of(int64_t token, int writer) { return static_cast<uint8_t>(token * 7 + writer + 1); }

// Writes tokens [length, length + count): one byte each, in place of a kernel. A new chunk has to be zero.
void append(KvCache& cache, int64_t count, int writer) {
  const int64_t had = chunks_for(cache.length());
  cache.reserve(count);
  for (int64_t c = had; c < chunks_for(cache.length() + count); ++c)
    for (int64_t i = 0; i < kLayout.chunk_bytes(); ++i)
      if (cache.chunks(0)[c][i] != 0) std::puts("a new chunk is not zero"), std::exit(1);
  for (int64_t t = cache.length(); t < cache.length() + count; ++t)
    cache.chunks(0)[t / kChunkTokens][t % kChunkTokens] = byte_of(t, writer);
  cache.advance(count);
}

// Whether the tokens are those of `first`, and from `from` on those of `writer`.
bool holds(const KvCache& cache, int64_t from, int writer) {
  for (int64_t t = 0; t < cache.length(); ++t)
    if (cache.chunks(0)[t / kChunkTokens][t % kChunkTokens] != byte_of(t, t < from ? 0 : writer)) return false;
  return true;
}

// Forks a cache of `length` tokens to threads; each appends to its own, forks again and truncates.
bool round_of(int64_t length) {
  std::vector<KvCache> forks;
  const std::shared_ptr<KvSlabs> slabs = KvSlabs::make();
  {
    KvCache cache({kLayout}, 1000, {}, slabs);
    append(cache, length, 0);
    for (int i = 0; i < 4; ++i) forks.push_back(cache.fork());
  }
  std::atomic<bool> good{true};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i, mine = std::move(forks[size_t(i)])]() mutable {
      if (!holds(mine, length, 0)) good = false;
      append(mine, 5 + i, i + 1);
      KvCache other = mine.fork();
      append(other, 200, i + 1);
      if (!holds(mine, length, i + 1) || !holds(other, length, i + 1)) good = false;
      mine.truncate(length - 1);
      append(mine, 1, 0);
      if (!holds(mine, length, 0)) good = false;
    });
  }
  threads.emplace_back([&slabs] {
    for (int i = 0; i < 20; ++i) ChunkMemory::prepare(*slabs, size_t(kLayout.chunk_bytes()), 8, 2);
  });
  for (std::thread& t : threads) t.join();
  return good;
}

}  // namespace

int main() {
  for (int i = 0; i < 200; ++i)
    if (!round_of(100 + i)) return std::puts("a cache has another's tokens"), 1;
  std::puts("good");
  return 0;
}
