#include "pack.h"

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace edgeformer {
namespace {

struct Shape {
  int64_t head;     // bytes of fp16 values before the weights of a block
  int64_t weights;  // bytes of weights of a block
  int64_t bytes() const { return head + weights; }
};

Shape shape_of(WeightType type) {
  switch (type) {
    case WeightType::q4a:
      return {64, 256};
    case WeightType::q4:
      return {32, 256};
    case WeightType::q8:
      return {32, 512};
    case WeightType::q8x16:
      return {64, 512};
    case WeightType::f32:
      break;
  }
  return {0, 0};
}

// Nibble of the flat element index, as the unsigned value (signed + 8).
uint8_t nibble_at(const uint8_t* q, int64_t index) {
  const uint8_t byte = q[index / 2];
  return uint8_t((index % 2 ? byte >> 4 : byte & 15) ^ 8);
}

// 8 bytes of 16 nibbles, low nibble first -> 16 bytes, one nibble each.
void spread_nibbles(uint64_t packed, uint64_t out[2]) {
  for (int half = 0; half < 2; half++) {
    uint64_t v = packed >> (32 * half) & 0xffffffffu;
    v = (v | v << 16) & 0x0000ffff0000ffffull;
    v = (v | v << 8) & 0x00ff00ff00ff00ffull;
    out[half] = (v | v << 4) & 0x0f0f0f0f0f0f0f0full;
  }
}

// One block of one row: 4 dwords of nibbles at `to`, 64 bytes apart (columns 0..15 low, 16..31 high).
void pack_nibbles(const uint8_t* q, int64_t index, int64_t columns, uint8_t* to) {
  uint64_t low[2], high[2];
  if (columns == kBlock && index % 2 == 0) {
    uint64_t raw[2];
    memcpy(raw, q + index / 2, 16);
    spread_nibbles(raw[0] ^ 0x8888888888888888ull, low);
    spread_nibbles(raw[1] ^ 0x8888888888888888ull, high);
  } else {
    uint8_t bytes[32];
    for (int64_t c = 0; c < 32; c++) bytes[c] = c < columns ? nibble_at(q, index + c) : 8;
    memcpy(low, bytes, 16);
    memcpy(high, bytes + 16, 16);
  }
  for (int half = 0; half < 2; half++) {
    const uint64_t both = low[half] | high[half] << 4;
    memcpy(to + 128 * half, &both, 4);
    const uint32_t second = uint32_t(both >> 32);
    memcpy(to + 128 * half + 64, &second, 4);
  }
}

// One block of one row of int8; false where a value is -128.
bool pack_bytes(const int8_t* q, int64_t columns, uint8_t* to) {
  bool fits = true;
  for (int64_t c = 0; c < columns; c++) fits &= q[c] != -128;
  int8_t bytes[32] = {};
  memcpy(bytes, q, size_t(columns));
  for (int step = 0; step < 8; step++) {
    uint32_t four;
    memcpy(&four, bytes + 4 * step, 4);
    four ^= 0x80808080u;
    memcpy(to + 64 * step, &four, 4);
  }
  return fits;
}

}  // namespace

size_t panel_bytes(WeightType type, int64_t k) {
  if (type == WeightType::f32) return size_t(k * kLanes * 4);
  return size_t(blocks_of(k) * shape_of(type).bytes());
}

size_t packed_bytes(WeightType type, int64_t n, int64_t k) { return size_t(panels_of(n)) * panel_bytes(type, k); }

PackResult pack_rows(WeightType type, const PackSource& s, int64_t row_begin, int64_t row_end, const int64_t* dest,
                     void* packed) {
  PackResult result;
  const auto fits = [&result](float x, uint16_t* h) {
    const Half half = to_fp16(x, h);
    result.rounded |= half == Half::rounded;
    return half != Half::beyond;
  };
  const auto failed = [&result](PackError error) {
    result.error = error;
    return result;
  };
  const Shape shape = shape_of(type);
  const int64_t blocks = blocks_of(s.k), scales = type == WeightType::f32 ? 0 : (s.k + s.block - 1) / s.block;
  for (int64_t r = row_begin; r < row_end; r++) {
    const int64_t row = dest ? dest[r] : r, lane = row % kLanes;
    uint8_t* panel = static_cast<uint8_t*>(packed) + size_t(row / kLanes) * panel_bytes(type, s.k);
    if (type == WeightType::f32) {
      const float* from = static_cast<const float*>(s.q) + r * s.k;
      float* to = reinterpret_cast<float*>(panel) + lane;
      for (int64_t c = 0; c < s.k; c++) to[c * kLanes] = from[c];
      continue;
    }
    for (int64_t g = 0; g < blocks; g++) {
      uint8_t* block = panel + g * shape.bytes();
      const int64_t columns = s.k - g * kBlock < kBlock ? s.k - g * kBlock : kBlock;
      const float* scale = s.scale + r * scales;
      uint16_t h[2] = {0, 0};
      if (type == WeightType::q8x16) {
        if (!fits(scale[2 * g], &h[0])) return failed(PackError::scale_beyond_fp16);
        if (columns > 16 && !fits(scale[2 * g + 1], &h[1])) return failed(PackError::scale_beyond_fp16);
      } else {
        if (!fits(scale[g * kBlock / s.block], &h[0])) return failed(PackError::scale_beyond_fp16);
        if (type == WeightType::q4a && !fits(s.min[r * scales + g * kBlock / s.block], &h[1]))
          return failed(PackError::min_beyond_fp16);
      }
      memcpy(block + 2 * lane, &h[0], 2);
      if (shape.head == 64) memcpy(block + 32 + 2 * lane, &h[1], 2);
      uint8_t* to = block + shape.head + 4 * lane;
      const int64_t index = r * s.k + g * kBlock;
      if (shape.weights == 256)
        pack_nibbles(static_cast<const uint8_t*>(s.q), index, columns, to);
      else if (!pack_bytes(static_cast<const int8_t*>(s.q) + index, columns, to))
        return failed(PackError::weight_below_minus_127);
    }
  }
  return result;
}

void unpack_row(WeightType type, const void* packed, int64_t k, int64_t row, float* y) {
  const Shape shape = shape_of(type);
  const int64_t lane = row % kLanes;
  const uint8_t* panel = static_cast<const uint8_t*>(packed) + size_t(row / kLanes) * panel_bytes(type, k);
  for (int64_t c = 0; c < k; c++) {
    if (type == WeightType::f32) {
      y[c] = reinterpret_cast<const float*>(panel)[c * kLanes + lane];
      continue;
    }
    const uint8_t* block = panel + c / kBlock * shape.bytes();
    const int64_t at = c % kBlock;
    uint16_t h[2] = {0, 0};
    memcpy(&h[0], block + 2 * lane, 2);
    if (shape.head == 64) memcpy(&h[1], block + 32 + 2 * lane, 2);
    const uint8_t* w = block + shape.head + 4 * lane;
    if (shape.weights == 512) {
      const float q = float(int(w[at / 4 * 64 + at % 4]) - 128);
      y[c] = q * from_fp16(type == WeightType::q8x16 && at >= 16 ? h[1] : h[0]);
    } else {
      const uint8_t byte = w[at % 16 / 4 * 64 + at % 4];
      const int q = at < 16 ? byte & 15 : byte >> 4;
      y[c] = type == WeightType::q4a ? __builtin_fmaf(float(q), from_fp16(h[0]), from_fp16(h[1]))
                                     : float(q - 8) * from_fp16(h[0]);
    }
  }
}

float from_fp16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t u = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
  float value;
  if (exponent == 0) {
    value = float(mantissa) * 0x1p-24f;
    memcpy(&u, &value, 4);
    u |= sign;
  }
  memcpy(&value, &u, 4);
  return value;
}

Half to_fp16(float x, uint16_t* h) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x38800000u) {  // 2^-14: normal in fp16
    const uint32_t nearest = magnitude + 0xfff + (magnitude >> 13 & 1);
    if (nearest >= 0x47800000u) return Half::beyond;
    *h = uint16_t(sign | (nearest - 0x38000000u) >> 13);
    return magnitude & 0x1fff ? Half::rounded : Half::exact;
  }
  float value;
  memcpy(&value, &magnitude, 4);
  const float units = value * 0x1p24f;                // exact
  const float nearest = (units + 0x1p23f) - 0x1p23f;  // to even
  *h = uint16_t(sign | uint16_t(nearest));
  return units == nearest ? Half::exact : Half::rounded;
}

namespace {
constexpr size_t kHugePage = size_t(2) << 20;
}

void* weights_alloc(size_t bytes) {
#if defined(__linux__)
  // mmap gives zeroed pages, untouched until they are packed. Over-map to start at a huge page, and give the rest back.
  const bool huge = bytes >= kHugePage;
  const size_t page = 4096, size = (bytes + page - 1) / page * page, spare = huge ? kHugePage : 0;
  if (size == 0) return nullptr;
  void* mapped = mmap(nullptr, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (!huge) return mapped;
  uint8_t* start = static_cast<uint8_t*>(mapped);
  const size_t lead = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (lead) munmap(start, lead);
  if (spare - lead) munmap(start + lead + size, spare - lead);
#if defined(MADV_HUGEPAGE)
  madvise(start + lead, size, MADV_HUGEPAGE);  // only a wish
#endif
  return start + lead;
#else
  void* p = nullptr;
  if (bytes == 0 || posix_memalign(&p, 64, bytes)) return nullptr;
  memset(p, 0, bytes);
  return p;
#endif
}

void weights_free(void* p, size_t bytes) {
  if (!p) return;
#if defined(__linux__)
  munmap(p, (bytes + 4095) / 4096 * 4096);
#else
  (void)bytes;
  free(p);
#endif
}

}  // namespace edgeformer
