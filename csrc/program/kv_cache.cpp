#include "program/kv_cache.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace edgeformer {
namespace {

int64_t chunks_for(int64_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }

constexpr char kMagic[8] = {'e', 'f', 'k', 'v', '0', '0', '0', '2'};
constexpr int64_t kLayerFields = 4;

}  // namespace

void KvCache::FreeChunk::operator()(uint8_t* p) const { std::free(p); }

KvCache::Chunk KvCache::make_chunk(size_t bytes) {
  // Zeroed: kernels read whole tiles, including tokens that were never written.
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes ? bytes : 64)) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return Chunk(static_cast<uint8_t*>(p));
}

KvCache::KvCache(std::vector<KvLayout> layers, int64_t limit)
    : layouts_(std::move(layers)), owned_(layouts_.size()), pointers_(layouts_.size()), limit_(limit) {
  for (const KvLayout& l : layouts_)
    if (l.head_dim < 1 || l.head_dim > kMaxHeadDim || l.value_dim < 1 || l.value_dim > kMaxHeadDim || l.kv_heads < 1)
      throw std::invalid_argument("KV cache: " + std::to_string(l.kv_heads) + " heads of " +
                                  std::to_string(l.head_dim) + " and " + std::to_string(l.value_dim) +
                                  " columns, expected at least one head and 1 to " + std::to_string(kMaxHeadDim));
}

void KvCache::resize_chunks(int64_t count) {
  for (size_t layer = 0; layer < layouts_.size(); layer++) {
    owned_[layer].reserve(size_t(count));
    pointers_[layer].reserve(size_t(count));
    while (int64_t(owned_[layer].size()) > count) owned_[layer].pop_back(), pointers_[layer].pop_back();
    while (int64_t(owned_[layer].size()) < count) {
      owned_[layer].push_back(make_chunk(layouts_[layer].chunk_bytes()));
      pointers_[layer].push_back(owned_[layer].back().get());
    }
  }
}

void KvCache::reserve(int64_t tokens) {
  if (tokens < 0 || tokens > limit_ - length_)
    throw std::length_error("KV cache: " + std::to_string(length_) + " tokens in the cache and " +
                            std::to_string(tokens) + " more requested, the limit is " + std::to_string(limit_));
  const int64_t count = chunks_for(length_ + tokens);
  for (const auto& layer : owned_)
    if (int64_t(layer.size()) < count) return resize_chunks(count);
}

void KvCache::advance(int64_t tokens) { length_ += tokens; }

void KvCache::truncate(int64_t length) {
  if (length < 0 || length > length_)
    throw std::out_of_range("KV cache: cannot truncate " + std::to_string(length_) + " tokens to " +
                            std::to_string(length));
  length_ = length;
  resize_chunks(chunks_for(length));
}

KvCache KvCache::fork() const {
  KvCache copy(layouts_, limit_);
  copy.resize_chunks(chunks_for(length_));
  for (size_t layer = 0; layer < layouts_.size(); layer++)
    for (size_t c = 0; c < copy.owned_[layer].size(); c++)
      std::memcpy(copy.pointers_[layer][c], pointers_[layer][c], layouts_[layer].chunk_bytes());
  copy.length_ = length_;
  return copy;
}

size_t KvCache::bytes() const {
  size_t total = 0;
  for (size_t layer = 0; layer < layouts_.size(); layer++)
    total += owned_[layer].size() * size_t(layouts_[layer].chunk_bytes());
  return total;
}

size_t KvCache::bytes_for(const std::vector<KvLayout>& layers, int64_t tokens) {
  size_t total = 0;
  for (const KvLayout& l : layers) total += size_t(chunks_for(tokens)) * size_t(l.chunk_bytes());
  return total;
}

std::vector<uint8_t> KvCache::save() const {
  std::vector<int64_t> header = {length_, layers()};
  for (const KvLayout& l : layouts_)
    header.insert(header.end(), {int64_t(l.type), l.kv_heads, l.head_dim, l.value_dim});
  const int64_t count = chunks_for(length_);
  std::vector<uint8_t> out(sizeof kMagic + header.size() * 8 + bytes_for(layouts_, length_));
  uint8_t* to = out.data();
  std::memcpy(to, kMagic, sizeof kMagic);
  std::memcpy(to += sizeof kMagic, header.data(), header.size() * 8);
  to += header.size() * 8;
  for (size_t layer = 0; layer < layouts_.size(); layer++)
    for (int64_t c = 0; c < count; c++, to += layouts_[layer].chunk_bytes())
      std::memcpy(to, pointers_[layer][size_t(c)], size_t(layouts_[layer].chunk_bytes()));
  return out;
}

void KvCache::load(const uint8_t* data, size_t size) {
  const size_t header_bytes = sizeof kMagic + (2 + layouts_.size() * kLayerFields) * 8;
  if (size < header_bytes || std::memcmp(data, kMagic, sizeof kMagic) != 0)
    throw std::invalid_argument("KV cache: these bytes were not written by save() of this version");
  std::vector<int64_t> header(2 + layouts_.size() * kLayerFields);
  std::memcpy(header.data(), data + sizeof kMagic, header.size() * 8);
  const int64_t length = header[0];
  bool same = header[1] == layers();
  for (size_t layer = 0; same && layer < layouts_.size(); layer++) {
    const KvLayout& l = layouts_[layer];
    const int64_t* f = &header[2 + layer * kLayerFields];
    same = f[0] == int64_t(l.type) && f[1] == l.kv_heads && f[2] == l.head_dim && f[3] == l.value_dim;
  }
  if (!same) throw std::invalid_argument("KV cache: the saved layers, heads or sizes are not those of this model");
  if (length < 0 || length > limit_)
    throw std::invalid_argument("KV cache: " + std::to_string(length) + " tokens saved, the limit is " +
                                std::to_string(limit_));
  const size_t expected = header_bytes + bytes_for(layouts_, length);
  if (size != expected)
    throw std::invalid_argument("KV cache: " + std::to_string(size) + " bytes, expected " + std::to_string(expected));
  KvCache fresh(layouts_, limit_);
  fresh.resize_chunks(chunks_for(length));
  const uint8_t* from = data + header_bytes;
  for (size_t layer = 0; layer < layouts_.size(); layer++)
    for (uint8_t* chunk : fresh.pointers_[layer]) {
      std::memcpy(chunk, from, size_t(layouts_[layer].chunk_bytes()));
      from += layouts_[layer].chunk_bytes();
    }
  fresh.length_ = length;
  *this = std::move(fresh);
}

}  // namespace edgeformer
