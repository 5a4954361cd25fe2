// Chunks of the KV cache: memory for kChunkTokens tokens that several caches may share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "program/kv_slabs.h"

namespace edgeformer {

// A counted reference to one layer's part of a chunk, or to nothing. Threads may hold references to the same memory.
// Memory that is shared is read-only; who holds the only reference may write.
class ChunkMemory {
 public:
  ChunkMemory() = default;
  static ChunkMemory allocate(KvSlabs& slabs, size_t bytes);  // throws std::bad_alloc
  static ChunkMemory zeroed(KvSlabs& slabs, size_t bytes);    // the same
  // As KvSlabs::prepare, for `zeroed(slabs, bytes)`.
  static void prepare(KvSlabs& slabs, size_t bytes, size_t wanted, size_t most) {
    slabs.prepare(kHeader + bytes, wanted, most);
  }
  ChunkMemory(const ChunkMemory& other) : block_(other.block_) {
    if (block_) block_->users.fetch_add(1, std::memory_order_relaxed);
  }
  ChunkMemory(ChunkMemory&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  ChunkMemory& operator=(ChunkMemory other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~ChunkMemory() { release(); }

  explicit operator bool() const { return block_ != nullptr; }
  uint8_t* data() const { return block_ ? reinterpret_cast<uint8_t*>(block_) + kHeader : nullptr; }
  size_t bytes() const { return block_ ? block_->bytes : 0; }
  // Acquire: when the answer is no, all reads by former holders have happened, and the memory may be written.
  bool shared() const { return block_ && block_->users.load(std::memory_order_acquire) != 1; }
  ChunkMemory copy(KvSlabs& slabs) const;  // throws std::bad_alloc

 private:
  struct Block {
    std::atomic<int64_t> users;
    size_t bytes;
    KvSlab* slab;
  };
  static constexpr size_t kHeader = 64;  // bytes from the block to its data, which the kernels want aligned

  static ChunkMemory of(const KvSlabs::Taken& taken, size_t bytes);
  void release();

  Block* block_ = nullptr;
};

// kChunkTokens tokens in all layers. A layer's memory is missing where the tokens were outside its window.
struct KvChunk {
  std::vector<ChunkMemory> layers;

  size_t bytes() const {
    size_t total = 0;
    for (const ChunkMemory& m : layers) total += m.bytes();
    return total;
  }
};

}  // namespace edgeformer
