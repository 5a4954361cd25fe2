// The KV cache of one state: all layers, grown by chunks of kChunkTokens tokens, which several caches may share.
//
// A chunk that is shared is read-only: reserve() copies it before tokens are appended to it. A layer with a sliding
// window releases the chunks that no query can see any more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "program/kv_chunk.h"

namespace edgeformer {

// Tokens that truncate() can always remove: a layer with a window keeps so many more.
constexpr int64_t kRewindTokens = 128;

class KvCache {
 public:
  // limit: most tokens. windows: of each layer, most keys that a query sees, 0 for all; {}: all 0. Allocates nothing.
  // slabs: where its memory comes from, for caches of one model the same.
  KvCache(const std::vector<KvLayout>& layouts, int64_t limit, const std::vector<int64_t>& windows = {},
          std::shared_ptr<KvSlabs> slabs = KvSlabs::make());
  KvCache(KvCache&&) = default;
  KvCache& operator=(KvCache&&) = default;
  KvCache& operator=(const KvCache&) = delete;

  int64_t length() const { return length_; }  // tokens in the cache
  int64_t limit() const { return limit_; }
  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }
  const KvLayout& layout(int64_t layer) const { return layers_[layer].layout; }

  // Makes room for `tokens` more, in memory of this cache alone. Throws std::length_error past the limit, and
  // std::bad_alloc; length() and the tokens are then as before.
  void reserve(int64_t tokens);
  // After reserve(): pointers to the chunks of a layer, for kv_append and attention; valid until the next reserve. Null
  // where a chunk is outside the layer's window.
  uint8_t* const* chunks(int64_t layer) { return layers_[layer].pointers.data(); }
  const uint8_t* const* chunks(int64_t layer) const { return layers_[layer].pointers.data(); }
  // Adds the appended tokens to length().
  void advance(int64_t tokens);
  // Releases the chunks that no query sees, also after a truncation by kRewindTokens.
  void release_unseen();
  // Removes the tokens from `length` on and releases unused chunks. Throws std::out_of_range, also for a length other
  // than 0 below shortest().
  void truncate(int64_t length);
  // The least length but 0 that truncate() can cut to: below it a window misses keys. 0: any.
  int64_t shortest() const;

  KvCache fork() const;  // an independent cache, which shares all chunks

  // Chunk `index`, shared. Throws std::out_of_range if the cache does not hold all its tokens.
  KvChunk chunk(int64_t index) const;
  // Of an empty cache: takes the first `length` tokens of the chunks, or the most below that from which every window can
  // go on. Returns their number. Throws std::invalid_argument for chunks of other layers, or more tokens than there are.
  int64_t restore(const std::vector<const KvChunk*>& chunks, int64_t length);

  size_t bytes_alone() const;                                // in memory of this cache alone
  size_t bytes_shared() const;                               // in chunks that others hold too
  size_t bytes_of_slabs() const { return slabs_->bytes(); }  // from which they come, of all caches of the model
  // The most that a cache of `tokens` holds, appended at most `step` tokens before each release_unseen().
  static size_t bytes_for(const std::vector<KvLayout>& layouts, const std::vector<int64_t>& windows, int64_t tokens,
                          int64_t step);

  // kv_saved.cpp: tokens as bytes, the same for all tables: a header with the shapes, then the chunks. The loads throw
  // std::invalid_argument for other layers, a wrong size, or more tokens than the limit.
  std::vector<uint8_t> save() const;
  void load(const uint8_t* data, size_t size);
  std::vector<uint8_t> save_chunk(const KvChunk& chunk) const;
  KvChunk load_chunk(const uint8_t* data, size_t size) const;

 private:
  struct Layer {
    KvLayout layout;
    int64_t window;
    int64_t released = 0;                 // chunks from the first on that are outside the window
    std::vector<ChunkMemory> owned = {};  // by chunk
    std::vector<uint8_t*> pointers = {};  // the same, as the kernels read it

    int64_t count() const { return static_cast<int64_t>(owned.size()); }
    void put(int64_t chunk, ChunkMemory memory);
    void shrink(int64_t count);
    void grow(KvSlabs& slabs, int64_t count);
  };

  KvCache(const KvCache&) = default;
  void check_layers(const KvChunk& chunk) const;
  bool can_go_on(const std::vector<const KvChunk*>& chunks, int64_t length) const;

  std::shared_ptr<KvSlabs> slabs_;
  std::vector<Layer> layers_;
  int64_t length_ = 0;
  int64_t limit_;
};

constexpr int64_t chunks_for(int64_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }

}  // namespace edgeformer
