#include "program/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace edgeformer {
namespace {

// The least length after which a query of a layer sees no key of the first `released` chunks.
int64_t shortest_after(int64_t released, int64_t window) { return released ? released * kChunkTokens + window - 1 : 0; }

// Chunks from the first on that a layer lacks in these: those up to the last one without its memory.
int64_t missing(const std::vector<const KvChunk*>& chunks, int64_t count, size_t layer) {
  while (count > 0 && chunks[size_t(count - 1)]->layers[layer]) --count;
  return count;
}

}  // namespace

ChunkMemory ChunkMemory::of(const KvSlabs::Taken& taken, size_t bytes) {
  ChunkMemory memory;
  memory.block_ = new (taken.memory) Block{{1}, bytes, taken.slab};
  return memory;
}

ChunkMemory ChunkMemory::allocate(KvSlabs& slabs, size_t bytes) { return of(slabs.take(kHeader + bytes), bytes); }

ChunkMemory ChunkMemory::zeroed(KvSlabs& slabs, size_t bytes) {
  const KvSlabs::Taken taken = slabs.take(kHeader + bytes);
  ChunkMemory memory = of(taken, bytes);
  // kernels read whole tiles, including tokens that were never written
  if (!taken.zero) std::memset(memory.data(), 0, bytes);
  return memory;
}

ChunkMemory ChunkMemory::copy(KvSlabs& slabs) const {
  ChunkMemory memory = allocate(slabs, bytes());
  std::memcpy(memory.data(), data(), bytes());
  return memory;
}

void ChunkMemory::release() {
  // Release: this holder's reads happen before another's write. Acquire: and before the memory is given back.
  if (!block_ || block_->users.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  KvSlab* slab = block_->slab;
  block_->~Block();
  KvSlabs::give(block_, slab);
}

void KvCache::Layer::put(int64_t chunk, ChunkMemory memory) {
  owned[size_t(chunk)] = std::move(memory);
  pointers[size_t(chunk)] = owned[size_t(chunk)].data();
}

void KvCache::Layer::shrink(int64_t n) {
  if (n >= count()) return;
  owned.resize(size_t(n));
  pointers.resize(size_t(n));
  released = std::min(released, n);
}

void KvCache::Layer::grow(KvSlabs& slabs, int64_t n) {
  owned.reserve(size_t(n));
  pointers.reserve(size_t(n));
  while (count() < n) {
    owned.push_back(ChunkMemory::zeroed(slabs, size_t(layout.chunk_bytes())));
    pointers.push_back(owned.back().data());
  }
}

KvCache::KvCache(const std::vector<KvLayout>& layouts, int64_t limit, const std::vector<int64_t>& windows,
                 std::shared_ptr<KvSlabs> slabs)
    : slabs_(std::move(slabs)), limit_(limit) {
  for (size_t i = 0; i < layouts.size(); ++i) {
    const KvLayout& l = layouts[i];
    if (l.head_dim < 1 || l.head_dim > kMaxHeadDim || l.value_dim < 1 || l.value_dim > kMaxHeadDim || l.kv_heads < 1)
      throw std::invalid_argument("KV cache: " + std::to_string(l.kv_heads) + " heads of " +
                                  std::to_string(l.head_dim) + " and " + std::to_string(l.value_dim) +
                                  " columns, expected at least one head and 1 to " + std::to_string(kMaxHeadDim));
    layers_.push_back({l, windows.empty() ? 0 : windows.at(i)});
  }
}

void KvCache::reserve(int64_t tokens) {
  if (tokens < 0 || tokens > limit_ - length_)
    throw std::length_error("KV cache: " + std::to_string(length_) + " tokens in the cache and " +
                            std::to_string(tokens) + " more requested, the limit is " + std::to_string(limit_));
  if (tokens == 0) return;
  const int64_t first = length_ / kChunkTokens, count = chunks_for(length_ + tokens);
  for (Layer& l : layers_) {
    // No other chunk that is written to is shared: forks and `chunk` take only chunks with tokens.
    if (first < l.count() && l.owned[size_t(first)].shared()) l.put(first, l.owned[size_t(first)].copy(*slabs_));
    l.grow(*slabs_, count);
  }
}

void KvCache::advance(int64_t tokens) { length_ += tokens; }

void KvCache::release_unseen() {
  for (Layer& l : layers_) {
    if (l.window == 0) continue;
    const int64_t first = length_ - kRewindTokens + 1 - l.window;  // the first key that the earliest next query sees
    for (; (l.released + 1) * kChunkTokens <= first; ++l.released) l.put(l.released, {});
  }
}

int64_t KvCache::shortest() const {
  int64_t length = 0;
  for (const Layer& l : layers_) length = std::max(length, shortest_after(l.released, l.window));
  return length;
}

void KvCache::truncate(int64_t length) {
  if (length < 0 || length > length_ || (length != 0 && length < shortest()))
    throw std::out_of_range("KV cache: cannot truncate " + std::to_string(length_) + " tokens to " +
                            std::to_string(length) + "; the shortest is " + std::to_string(shortest()));
  length_ = length;
  for (Layer& l : layers_) l.shrink(chunks_for(length));
}

KvCache KvCache::fork() const {
  KvCache copy(*this);
  for (Layer& l : copy.layers_) l.shrink(chunks_for(length_));  // what is reserved stays with this cache
  return copy;
}

KvChunk KvCache::chunk(int64_t index) const {
  if (index < 0 || index >= length_ / kChunkTokens)
    throw std::out_of_range("KV cache: chunk " + std::to_string(index) + ", the cache has " +
                            std::to_string(length_ / kChunkTokens) + " full chunks");
  KvChunk chunk;
  for (const Layer& l : layers_) chunk.layers.push_back(l.owned[size_t(index)]);
  return chunk;
}

void KvCache::check_layers(const KvChunk& chunk) const {
  bool same = chunk.layers.size() == layers_.size();
  for (size_t i = 0; same && i < layers_.size(); ++i) {
    const Layer& l = layers_[i];
    same = chunk.layers[i] ? chunk.layers[i].bytes() == size_t(l.layout.chunk_bytes()) : l.window != 0;
  }
  if (!same) throw std::invalid_argument("KV cache: the chunk's layers, heads or sizes are not those of this model");
}

bool KvCache::can_go_on(const std::vector<const KvChunk*>& chunks, int64_t length) const {
  for (size_t i = 0; i < layers_.size(); ++i)
    if (length < shortest_after(missing(chunks, chunks_for(length), i), layers_[i].window)) return false;
  return true;
}

int64_t KvCache::restore(const std::vector<const KvChunk*>& chunks, int64_t length) {
  const int64_t most = std::min(limit_, int64_t(chunks.size()) * kChunkTokens);
  if (length_ != 0 || length < 0 || length > most)
    throw std::invalid_argument("KV cache: restore " + std::to_string(length) + " of " + std::to_string(most) +
                                " tokens to a cache of " + std::to_string(length_));
  for (const KvChunk* chunk : chunks) check_layers(*chunk);
  while (!can_go_on(chunks, length)) length = (length - 1) / kChunkTokens * kChunkTokens;
  const int64_t count = chunks_for(length);
  KvCache fresh(*this);
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& l = fresh.layers_[i];
    l.owned.assign(size_t(count), {});
    l.pointers.assign(size_t(count), nullptr);
    l.released = missing(chunks, count, i);
    for (int64_t c = l.released; c < count; ++c) l.put(c, chunks[size_t(c)]->layers[i]);
  }
  fresh.length_ = length;
  fresh.release_unseen();
  *this = std::move(fresh);
  return length;
}

size_t KvCache::bytes_alone() const {
  size_t total = 0;
  for (const Layer& l : layers_)
    for (const ChunkMemory& m : l.owned) total += m.shared() ? 0 : m.bytes();
  return total;
}

size_t KvCache::bytes_shared() const {
  size_t total = 0;
  for (const Layer& l : layers_)
    for (const ChunkMemory& m : l.owned) total += m.shared() ? m.bytes() : 0;
  return total;
}

size_t KvCache::bytes_for(const std::vector<KvLayout>& layouts, const std::vector<int64_t>& windows, int64_t tokens,
                          int64_t step) {
  size_t total = 0;
  for (size_t i = 0; i < layouts.size(); ++i) {
    int64_t chunks = chunks_for(tokens);
    // From the first key of the earliest next query, in the middle of a chunk, to the end of the step.
    if (windows[i]) chunks = std::min(chunks, chunks_for(windows[i] + kRewindTokens + step) + 1);
    total += size_t(chunks) * size_t(layouts[i].chunk_bytes());
  }
  return total;
}

}  // namespace edgeformer
