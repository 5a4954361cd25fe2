#include "kernels/pack.h"

#include <string.h>

namespace edgeformer {
namespace {

struct Shape {
  int64_t head;       // bytes of fp16 values before the weights of a block
  int64_t weights;    // bytes of the weights of 32 columns
  int64_t parts = 1;  // groups of 32 columns in a block
  constexpr int64_t bytes() const { return head + weights * parts; }
  // Offsets in a panel of the scales and the weights of its columns 32 g .. 32 g + 31.
  constexpr int64_t head_at(int64_t g) const { return g / parts * bytes(); }
  constexpr int64_t weights_at(int64_t g) const { return head_at(g) + head + g % parts * weights; }
};

constexpr Shape shape_of(WeightType type) {
  switch (type) {
    case WeightType::q4a:
      return {64, 256};
    case WeightType::q4:
      return {32, 256};
    case WeightType::q4x64:
      return {32, 256, 2};
    case WeightType::q8:
      return {32, 512};
    case WeightType::q8x16:
      return {64, 512};
    case WeightType::q8x128:
      return {64, 512, 4};
    case WeightType::f32:
      break;
  }
  return {0, 0};
}

// The INT4 element `index` as q + 8.
uint8_t nibble_at(const uint8_t* q, int64_t index) {
  const uint8_t byte = q[index / 2];
  return uint8_t((index % 2 ? byte >> 4 : byte & 15) ^ 8);
}

using Bytes8 = uint8_t __attribute__((vector_size(8)));
using Pairs8 = uint16_t __attribute__((vector_size(16)));
using Fours4 = uint32_t __attribute__((vector_size(16)));

// 32 columns of one row: 4 dwords of nibbles at `to`, 64 bytes apart; columns 0 .. 15 in the low halves, 16 .. 31 in
// the high ones.
inline void pack_nibbles(const uint8_t* q, int64_t index, int64_t columns, uint8_t* to) {
  Fours4 fours;
  if (columns == kBlock && index % 2 == 0) {
    Bytes8 half[2];  // of the columns
    memcpy(half, q + index / 2, 16);
    const Pairs8 low = __builtin_convertvector(half[0], Pairs8), high = __builtin_convertvector(half[1], Pairs8);
    const Pairs8 both = (((low | low << 4) & 0x0f0f) | ((high << 4 | high << 8) & 0xf0f0)) ^ 0x8888;
    fours = reinterpret_cast<Fours4>(both);
  } else {
    const auto at = [=](int64_t c) -> int { return c < columns ? nibble_at(q, index + c) : 8; };
    uint8_t bytes[16];
    for (int64_t c = 0; c < 16; c++) bytes[c] = uint8_t(at(c) | at(c + 16) << 4);
    memcpy(&fours, bytes, 16);
  }
  for (int step = 0; step < 4; step++) {
    const uint32_t four = fours[step];
    memcpy(to + 64 * step, &four, 4);
  }
}

// 32 columns of one row of int8: 8 dwords of bytes at `to`, 64 bytes apart; false if a value is -128.
bool pack_bytes(const int8_t* q, int64_t columns, uint8_t* to) {
  int8_t padded[kBlock] = {};
  if (columns < kBlock) q = static_cast<const int8_t*>(memcpy(padded, q, size_t(columns)));
  uint8_t bytes[kBlock];
  int least = 0;
  for (int c = 0; c < kBlock; c++) {
    bytes[c] = uint8_t(q[c]) ^ kByteFlip;
    least |= q[c] == -128;
  }
  for (int step = 0; step < 8; step++) memcpy(to + 64 * step, bytes + 4 * step, 4);
  return !least;
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

// How fp16 represents a float. beyond: not at all (NaN, infinity, a magnitude of 65520 or more).
enum class Half { exact, rounded, beyond };

// h[i] = x[i] as fp16, rounded to nearest even, without branches. Returns the worst case of the n floats.
Half to_fp16(const float* x, int64_t n, uint16_t* h) {
  uint32_t rounded = 0, beyond = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t u;
    memcpy(&u, x + i, 4);
    const int32_t magnitude = int32_t(u & 0x7fffffffu);
    // Normal in fp16: from 2^-14 on. Below, the low bits of 0.5 + value count units of 2^-24.
    const uint32_t normal = (uint32_t(magnitude) + 0xfff + (u >> 13 & 1) - 0x38000000u) >> 13;
    float value;
    memcpy(&value, &magnitude, 4);
    const float shifted = value + 0.5f;
    uint32_t small;
    memcpy(&small, &shifted, 4);
    small -= 0x3f000000u;
    const uint32_t is_normal = magnitude >= 0x38800000 ? ~0u : 0u, small_lost = shifted - 0.5f != value;
    rounded |= (is_normal & magnitude & 0x1fff) | (~is_normal & small_lost);
    beyond |= magnitude >= 0x477ff000;  // rounds to 2^16
    h[i] = uint16_t((u >> 16 & 0x8000u) | (is_normal & normal) | (~is_normal & small));
  }
  return beyond ? Half::beyond : rounded ? Half::rounded : Half::exact;
}

// Bytes of one panel (16 rows); panel p starts at p * panel_bytes.
size_t panel_bytes(WeightType type, int64_t k) {
  if (type == WeightType::f32) return size_t(k * kLanes * 4);
  return size_t(shape_of(type).head_at(blocks_of(k)));
}

}  // namespace

size_t packed_bytes(WeightType type, int64_t n, int64_t k) { return size_t(panels_of(n)) * panel_bytes(type, k); }

namespace {

constexpr int64_t kPiece = 128;  // scales of a row that are converted at once; even, for q8x16's pairs

// Packs source row r as lane `lane` of a panel.
template <WeightType type>
PackError pack_row(const PackSource& s, int64_t r, int64_t lane, uint8_t* panel, bool* rounded) {
  constexpr Shape shape = shape_of(type);
  constexpr int64_t each = type == WeightType::q8x16 ? 2 : 1;  // scales of one block
  const int64_t blocks = blocks_of(s.k), scales = (s.k + s.block - 1) / s.block, spread = s.block * each / kBlock;
  int64_t g = 0;
  for (int64_t first = 0; first < scales; first += kPiece) {
    const int64_t count = scales - first < kPiece ? scales - first : kPiece;
    uint16_t scale[kPiece + 1], min[kPiece];
    scale[count] = 0;  // the second of a short last block
    const Half worst = to_fp16(s.scale + r * scales + first, count, scale);
    if (worst == Half::beyond) return PackError::scale_beyond_fp16;
    *rounded |= worst == Half::rounded;
    if (type == WeightType::q4a) {
      const Half worst_min = to_fp16(s.min + r * scales + first, count, min);
      if (worst_min == Half::beyond) return PackError::min_beyond_fp16;
      *rounded |= worst_min == Half::rounded;
    }
    for (int64_t j = 0; j < count; j += each) {
      const int64_t end = g + spread < blocks ? g + spread : blocks;
      for (; g < end; g++) {
        uint8_t* block = panel + shape.head_at(g);
        memcpy(block + 2 * lane, scale + j, 2);
        if (type == WeightType::q4a) memcpy(block + 32 + 2 * lane, min + j, 2);
        if (type == WeightType::q8x16) memcpy(block + 32 + 2 * lane, scale + j + 1, 2);
        uint8_t* to = panel + shape.weights_at(g) + 4 * lane;
        const int64_t index = r * s.k + g * kBlock;
        const int64_t columns = s.k - g * kBlock < kBlock ? s.k - g * kBlock : kBlock;
        if (shape.weights == 256)
          pack_nibbles(static_cast<const uint8_t*>(s.q), index, columns, to);
        else if (!pack_bytes(static_cast<const int8_t*>(s.q) + index, columns, to))
          return PackError::weight_below_minus_127;
      }
    }
  }
  return PackError::none;
}

template <>
PackError pack_row<WeightType::f32>(const PackSource& s, int64_t r, int64_t lane, uint8_t* panel, bool*) {
  const float* from = static_cast<const float*>(s.q) + r * s.k;
  float* to = reinterpret_cast<float*>(panel) + lane;
  for (int64_t c = 0; c < s.k; c++) to[c * kLanes] = from[c];
  return PackError::none;
}

}  // namespace

PackResult pack_rows(WeightType type, const PackSource& s, int64_t row_begin, int64_t row_end, const int64_t* dest,
                     void* packed) {
  constexpr decltype(&pack_row<WeightType::q4>) by_type[] = {
      // in WeightType's order
      pack_row<WeightType::q4a>,   pack_row<WeightType::q4>,     pack_row<WeightType::q4x64>, pack_row<WeightType::q8>,
      pack_row<WeightType::q8x16>, pack_row<WeightType::q8x128>, pack_row<WeightType::f32>};
  PackResult result;
  for (int64_t r = row_begin; r < row_end && result.error == PackError::none; r++) {
    const int64_t row = dest ? dest[r] : r;
    uint8_t* panel = static_cast<uint8_t*>(packed) + size_t(row / kLanes) * panel_bytes(type, s.k);
    result.error = by_type[int(type)](s, r, row % kLanes, panel, &result.rounded);
  }
  return result;
}

void unpack_row(WeightType type, const void* packed, int64_t k, int64_t row, float* y) {
  const Shape shape = shape_of(type);
  const int64_t lane = row % kLanes;
  const uint8_t* panel = static_cast<const uint8_t*>(packed) + size_t(row / kLanes) * panel_bytes(type, k);
  if (type == WeightType::f32) {
    for (int64_t c = 0; c < k; c++) y[c] = reinterpret_cast<const float*>(panel)[c * kLanes + lane];
    return;
  }
  for (int64_t g = 0; g < blocks_of(k); g++) {
    const uint8_t *block = panel + shape.head_at(g), *w = panel + shape.weights_at(g) + 4 * lane;
    uint16_t h[2] = {0, 0};
    memcpy(&h[0], block + 2 * lane, 2);
    if (type == WeightType::q4a || type == WeightType::q8x16) memcpy(&h[1], block + 32 + 2 * lane, 2);
    const float scale = from_fp16(h[0]), second = from_fp16(h[1]);
    uint8_t bytes[kBlock];  // as packed; of nibbles only the first 16
    for (int64_t step = 0; step < shape.weights / 64; step++) memcpy(bytes + 4 * step, w + 64 * step, 4);
    float values[kBlock];
    for (int c = 0; c < 16; c++) {
      if (shape.weights == 512) {
        values[c] = float(byte_weight(bytes[c])) * scale;
        values[c + 16] = float(byte_weight(bytes[c + 16])) * (type == WeightType::q8x16 ? second : scale);
      } else if (type == WeightType::q4a) {
        values[c] = float(bytes[c] & 15) * scale + second;  // = fma: the product is exact
        values[c + 16] = float(bytes[c] >> 4) * scale + second;
      } else {
        values[c] = float((bytes[c] & 15) - 8) * scale;
        values[c + 16] = float((bytes[c] >> 4) - 8) * scale;
      }
    }
    const int64_t columns = k - g * kBlock < kBlock ? k - g * kBlock : kBlock;
    memcpy(y + g * kBlock, values, size_t(columns) * sizeof(float));
  }
}

}  // namespace edgeformer
