// Memory for the KV caches of one model: blocks of a few sizes, cut from slabs.
//
// The sequences of a step may all begin a new chunk at once. Memory that nobody used costs a page fault every 4 KiB
// then, and used memory has to be cleared: `prepare` does both beforehand, a little in each step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace edgeformer {

class KvSlabs;

// Blocks of one size in one piece of memory.
struct KvSlab {
  uint8_t* memory;
  size_t block;                              // bytes of a block
  size_t blocks;                             // that fit
  size_t cut = 0;                            // blocks that were handed out or prepared at least once: the first ones
  size_t used = 0;                           // blocks that are handed out
  std::vector<void*> returned = {};          // blocks that came back, not prepared
  std::shared_ptr<KvSlabs> owner = nullptr;  // while a block is handed out

  bool has_room() const { return cut < blocks || !returned.empty(); }
};

// Threads may call at the same time.
class KvSlabs : public std::enable_shared_from_this<KvSlabs> {
 public:
  struct Taken {
    void* memory;
    KvSlab* slab;
    bool zero;  // all its bytes are 0
  };

  static std::shared_ptr<KvSlabs> make() { return std::shared_ptr<KvSlabs>(new KvSlabs); }
  ~KvSlabs();
  KvSlabs(const KvSlabs&) = delete;
  KvSlabs& operator=(const KvSlabs&) = delete;

  // A block of `bytes`, aligned to 64 bytes. Throws std::bad_alloc.
  Taken take(size_t bytes);
  // Back to its slab. Of each size one slab without blocks in use is kept, for the next sequence.
  static void give(void* block, KvSlab* slab);
  // Clears blocks for take(), at most `most`, until `wanted` are ready. Without memory it does less.
  void prepare(size_t bytes, size_t wanted, size_t most);
  size_t bytes() const;  // of all slabs
  // In a child of fork(): a thread of the parent may have held the mutex, and no longer exists.
  void after_fork() { new (&mutex_) std::mutex; }

 private:
  struct Size {
    size_t block;
    std::vector<std::unique_ptr<KvSlab>> slabs = {};
    size_t full = 0;  // so many slabs, from the first on, have no room
    std::vector<std::pair<void*, KvSlab*>> ready = {};
  };

  KvSlabs() = default;
  Size& size_of(size_t bytes);
  static KvSlab* with_room(Size& size);
  static void* next_block(KvSlab& slab);
  static void release_surplus(Size& size);

  mutable std::mutex mutex_;
  std::vector<Size> sizes_;
};

}  // namespace edgeformer
