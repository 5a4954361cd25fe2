#include "program/kv_slabs.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <tuple>

#include "platform/memory.h"

namespace edgeformer {
namespace {

// Less than a huge page: to clear one takes up to 6 ms on a virtual machine whose host gives its memory late, and would
// save 6 to 17 % of the time of attention (docs/performance-log.md).
constexpr size_t kSlab = size_t(1) << 20;
constexpr size_t kAlign = 64;
// Small blocks: a slab has room for a few sequences of a tiny model, not for thousands.
constexpr size_t kMostBlocks = 256;

// With AddressSanitizer each block is an allocation of its own, so that it sees a kernel that reads past one.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAlone = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr bool kAlone = true;
#else
constexpr bool kAlone = false;
#endif
#else
constexpr bool kAlone = false;
#endif

// Large blocks would leave much of a slab unused: each gets pages of its own.
size_t blocks_of(size_t block) { return kAlone || block > kSlab / 4 ? 1 : std::min(kSlab / block, kMostBlocks); }

size_t bytes_of(const KvSlab& s) { return s.block * s.blocks; }

void* allocate(const KvSlab& s) { return kAlone ? aligned_new(kAlign, s.block) : pages_alloc(bytes_of(s)); }

void free_memory(const KvSlab& s) {
  if (kAlone)
    aligned_delete(s.memory);
  else
    pages_free(s.memory, bytes_of(s));
}

}  // namespace

KvSlabs::~KvSlabs() {
  for (const Size& size : sizes_)
    for (const auto& s : size.slabs) free_memory(*s);
}

KvSlabs::Size& KvSlabs::size_of(size_t bytes) {
  const size_t block = (bytes + kAlign - 1) / kAlign * kAlign;
  for (Size& size : sizes_)
    if (size.block == block) return size;
  sizes_.push_back({block});
  return sizes_.back();
}

// The first slab with room, so that the later ones become empty.
KvSlab* KvSlabs::with_room(Size& size) {
  for (; size.full < size.slabs.size(); ++size.full)
    if (size.slabs[size.full]->has_room()) return size.slabs[size.full].get();
  auto made = std::make_unique<KvSlab>(KvSlab{nullptr, size.block, blocks_of(size.block)});
  made->returned.reserve(made->blocks);  // give() must not fail
  size.slabs.reserve(size.slabs.size() + 1);
  made->memory = static_cast<uint8_t*>(allocate(*made));
  if (!made->memory) throw std::bad_alloc();
  size.slabs.push_back(std::move(made));
  return size.slabs.back().get();
}

void* KvSlabs::next_block(KvSlab& slab) {
  if (slab.returned.empty()) return slab.memory + slab.block * slab.cut++;
  void* memory = slab.returned.back();
  slab.returned.pop_back();
  return memory;
}

KvSlabs::Taken KvSlabs::take(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Size& size = size_of(bytes);
  Taken taken = {nullptr, nullptr, !size.ready.empty()};
  if (taken.zero) {
    std::tie(taken.memory, taken.slab) = size.ready.back();
    size.ready.pop_back();
  } else {
    taken.slab = with_room(size);
    taken.memory = next_block(*taken.slab);
  }
  if (taken.slab->used++ == 0) taken.slab->owner = shared_from_this();
  return taken;
}

void KvSlabs::give(void* block, KvSlab* slab) {
  const std::shared_ptr<KvSlabs> owner = slab->owner;  // outlives the lock
  const std::lock_guard<std::mutex> lock(owner->mutex_);
  Size& size = owner->size_of(slab->block);
  slab->returned.push_back(block);
  size.full = 0;
  if (--slab->used > 0) return;
  slab->owner.reset();
  release_surplus(size);
}

void KvSlabs::prepare(size_t bytes, size_t wanted, size_t most) {
  const std::lock_guard<std::mutex> lock(mutex_);
  try {
    Size& size = size_of(bytes);
    size.ready.reserve(wanted);
    for (; most > 0 && size.ready.size() < wanted; --most) {
      KvSlab* slab = with_room(size);
      void* block = next_block(*slab);
      std::memset(block, 0, size.block);
      size.ready.emplace_back(block, slab);
    }
  } catch (const std::bad_alloc&) {  // take() will say so, if it comes to that
  }
}

size_t KvSlabs::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t total = 0;
  for (const Size& size : sizes_)
    for (const auto& slab : size.slabs) total += bytes_of(*slab);
  return total;
}

// Of the slabs without a block in use, all but the first; what was prepared in them is lost.
void KvSlabs::release_surplus(Size& size) {
  std::vector<std::unique_ptr<KvSlab>> kept;
  kept.reserve(size.slabs.size());
  bool spare = false;
  for (auto& slab : size.slabs) {
    if (slab->used == 0 && std::exchange(spare, true)) {
      const auto inside = [&slab](const auto& ready) { return ready.second == slab.get(); };
      size.ready.erase(std::remove_if(size.ready.begin(), size.ready.end(), inside), size.ready.end());
      free_memory(*slab);
    } else {
      kept.push_back(std::move(slab));
    }
  }
  size.slabs = std::move(kept);
}

}  // namespace edgeformer
