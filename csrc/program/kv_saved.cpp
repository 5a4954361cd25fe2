// The KV cache and its chunks as bytes. The chunks are written as the kernels read them (KvLayout): all tables write the
// same bytes, and all machines that a table runs on are little-endian.
#include <cstring>
#include <stdexcept>
#include <string>

#include "program/kv_cache.h"

namespace edgeformer {
namespace {

constexpr char kCacheMagic[] = "efkv0003", kChunkMagic[] = "efkvc001";
constexpr size_t kMagicBytes = 8;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("KV cache: " + what); }

class Writer {
 public:
  Writer(const char* magic, size_t bytes) {
    out_.reserve(bytes);
    write(magic, kMagicBytes);
  }
  void write(const void* data, size_t bytes) {
    const auto* from = static_cast<const uint8_t*>(data);
    out_.insert(out_.end(), from, from + bytes);
  }
  void number(int64_t n) { write(&n, sizeof n); }
  void layout(const KvLayout& l) {
    for (const int64_t n : {int64_t(l.type), l.kv_heads, l.head_dim, l.value_dim}) number(n);
  }
  std::vector<uint8_t> take() { return std::move(out_); }

 private:
  std::vector<uint8_t> out_;
};

class Reader {
 public:
  Reader(const uint8_t* data, size_t size, const char* magic) : at_(data), left_(size) {
    if (size < kMagicBytes || std::memcmp(data, magic, kMagicBytes) != 0)
      refuse("these bytes were not written by save() of this version");
    skip(kMagicBytes);
  }
  int64_t number() {
    int64_t n;
    copy(&n, sizeof n);
    return n;
  }
  void copy(void* to, size_t bytes) {
    if (bytes > left_) refuse("the bytes are cut short");
    std::memcpy(to, at_, bytes);
    skip(bytes);
  }
  void same_layout(const KvLayout& l) {
    bool same = true;
    for (const int64_t n : {int64_t(l.type), l.kv_heads, l.head_dim, l.value_dim}) same = (number() == n) && same;
    if (!same) refuse("the saved layers, heads or sizes are not those of this model");
  }
  void end_after(size_t bytes) const {
    if (left_ != bytes) refuse(std::to_string(left_) + " bytes of keys and values, expected " + std::to_string(bytes));
  }

 private:
  void skip(size_t bytes) { at_ += bytes, left_ -= bytes; }

  const uint8_t* at_;
  size_t left_;
};

constexpr size_t kLayerHeader = 5 * sizeof(int64_t);

}  // namespace

// magic, length, number of layers; of each layer its layout and the chunks that its window released; the other chunks.
std::vector<uint8_t> KvCache::save() const {
  const int64_t count = chunks_for(length_);
  Writer out(kCacheMagic, kMagicBytes + 16 + layers_.size() * kLayerHeader + bytes_alone() + bytes_shared());
  out.number(length_);
  out.number(layers());
  for (const Layer& l : layers_) {
    out.layout(l.layout);
    out.number(l.released);
  }
  for (const Layer& l : layers_)
    for (int64_t c = l.released; c < count; ++c) out.write(l.pointers[size_t(c)], size_t(l.layout.chunk_bytes()));
  return out.take();
}

void KvCache::load(const uint8_t* data, size_t size) {
  Reader in(data, size, kCacheMagic);
  KvCache fresh(*this);
  fresh.length_ = 0;
  for (Layer& l : fresh.layers_) l.shrink(0);
  const int64_t length = in.number();
  if (length < 0 || length > limit_)
    refuse(std::to_string(length) + " tokens saved, the limit is " + std::to_string(limit_));
  const int64_t count = chunks_for(length);
  if (in.number() != layers()) refuse("the saved layers, heads or sizes are not those of this model");
  size_t bytes = 0;
  for (Layer& l : fresh.layers_) {
    in.same_layout(l.layout);
    l.released = in.number();
    if (l.released < 0 || l.released > count || (l.released && (l.window == 0 || length < fresh.shortest())))
      refuse("the saved windows are not those of this model");
    bytes += size_t(count - l.released) * size_t(l.layout.chunk_bytes());
  }
  in.end_after(bytes);
  for (Layer& l : fresh.layers_) {
    l.owned.resize(size_t(l.released));
    l.pointers.resize(size_t(l.released));
    l.grow(*slabs_, count);
    for (int64_t c = l.released; c < count; ++c) in.copy(l.pointers[size_t(c)], size_t(l.layout.chunk_bytes()));
  }
  fresh.length_ = length;
  *this = std::move(fresh);
}

// magic, number of layers; of each layer its layout and whether its memory is there; the memory.
std::vector<uint8_t> KvCache::save_chunk(const KvChunk& chunk) const {
  check_layers(chunk);
  Writer out(kChunkMagic, kMagicBytes + 8 + layers_.size() * kLayerHeader + chunk.bytes());
  out.number(layers());
  for (size_t i = 0; i < layers_.size(); ++i) {
    out.layout(layers_[i].layout);
    out.number(chunk.layers[i] ? 1 : 0);
  }
  for (const ChunkMemory& m : chunk.layers) out.write(m.data(), m.bytes());
  return out.take();
}

KvChunk KvCache::load_chunk(const uint8_t* data, size_t size) const {
  Reader in(data, size, kChunkMagic);
  if (in.number() != layers()) refuse("the saved layers, heads or sizes are not those of this model");
  std::vector<size_t> bytes;
  size_t total = 0;
  for (const Layer& l : layers_) {
    in.same_layout(l.layout);
    bytes.push_back(in.number() ? size_t(l.layout.chunk_bytes()) : 0);
    total += bytes.back();
  }
  in.end_after(total);
  KvChunk chunk;
  for (const size_t n : bytes) {
    chunk.layers.push_back(n ? ChunkMemory::allocate(*slabs_, n) : ChunkMemory());
    if (n) in.copy(chunk.layers.back().data(), n);
  }
  check_layers(chunk);
  return chunk;
}

}  // namespace edgeformer
