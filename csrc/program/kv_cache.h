// The KV cache of one state: all layers, grown by chunks of kChunkTokens tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"

namespace edgeformer {

class KvCache {
 public:
  // limit: most tokens. Allocates nothing.
  KvCache(std::vector<KvLayout> layers, int64_t limit);
  KvCache(KvCache&&) = default;
  KvCache& operator=(KvCache&&) = default;
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  int64_t length() const { return length_; }  // tokens in the cache
  int64_t limit() const { return limit_; }
  int64_t layers() const { return static_cast<int64_t>(layouts_.size()); }
  const KvLayout& layout(int64_t layer) const { return layouts_[layer]; }

  // Makes room for `tokens` more. Throws std::length_error past the limit, and std::bad_alloc; length() and the tokens
  // are then as before.
  void reserve(int64_t tokens);
  // After reserve(): pointers to the chunks of a layer, for kv_append and attention; valid until the next reserve.
  uint8_t* const* chunks(int64_t layer) { return pointers_[layer].data(); }
  const uint8_t* const* chunks(int64_t layer) const { return pointers_[layer].data(); }
  // Adds the appended tokens to length().
  void advance(int64_t tokens);
  // Removes the tokens from `length` on and frees unused chunks. Throws std::out_of_range.
  void truncate(int64_t length);

  KvCache fork() const;  // an independent copy

  size_t bytes() const;  // allocated now
  static size_t bytes_for(const std::vector<KvLayout>& layers, int64_t tokens);

  // The tokens as bytes, in this build's layout: a header with the shapes, then the chunks. load() throws
  // std::invalid_argument for other layers, a wrong size, or more tokens than the limit.
  std::vector<uint8_t> save() const;
  void load(const uint8_t* data, size_t size);

 private:
  struct FreeChunk {
    void operator()(uint8_t* p) const;
  };
  using Chunk = std::unique_ptr<uint8_t, FreeChunk>;
  static Chunk make_chunk(size_t bytes);
  void resize_chunks(int64_t count);

  std::vector<KvLayout> layouts_;
  std::vector<std::vector<Chunk>> owned_;        // [layer][chunk]
  std::vector<std::vector<uint8_t*>> pointers_;  // the same, as the kernels read it
  int64_t length_ = 0;
  int64_t limit_;
};

}  // namespace edgeformer
