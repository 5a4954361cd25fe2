// A cache that the graph reads itself.
#include <cstring>

#include "ops/ops.h"

namespace edgeformer {
namespace {

// A cache that the program reads as a tensor: appends x [batch, heads, rows, size] and gives the whole
// [batch, heads, past + rows, size]. It uses the value part of its cache layer alone.
class History final : public Op {
 public:
  using Op::Op;
  int64_t begin(Run& run, int) const override {
    const Tensor &x = in(run, 0), &y = out(run, 0);
    const int64_t layer = spec_.integer("layer");
    const KvLayout& l = run.spec->caches[layer];
    const int64_t heads = x.shape[1], rows = x.shape[2], size = x.shape[3], total = y.shape[2];
    const size_t bytes = size * sizeof(float);
    for (size_t b = 0; b < run.segments.size(); ++b) {
      const Segment& s = run.segments[b];
      for (int64_t h = 0; h < heads; ++h) {
        const float* from = x.f32() + (b * heads + h) * rows * size;
        float* to = y.f32() + (b * heads + h) * total * size;
        for (int64_t t = 0; t < total; ++t) {
          uint8_t* chunk = s.cache->chunks(layer)[t / kChunkTokens] + h * l.head_bytes() + l.values();
          void* place = chunk + t % kChunkTokens * l.value_stride() * sizeof(float);
          if (t >= s.past) std::memcpy(place, from + (t - s.past) * size, bytes);
          std::memcpy(to + t * size, place, bytes);
        }
      }
    }
    return 0;
  }
};

}  // namespace

std::unique_ptr<Op> make_history_op(int index, const OpSpec& spec) {
  if (spec.kind == "history") return std::make_unique<History>(index, spec);
  return nullptr;
}

}  // namespace edgeformer
