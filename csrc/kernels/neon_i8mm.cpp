// The NEON table for CPUs with SMMLA (Armv8.6 i8mm): Neoverse V1, Cortex-X2 and later. Only the tiled linears differ.
//
// SMMLA multiplies 2 x 8 bytes by 8 x 2 and adds to a 2 x 2 int32: twice SDOT's work. A tile is unpacked once into its
// operand order (two weight rows x 8 columns in 16 bytes), two rows of activations are the other operand.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif

#include "scalar_math.h"

namespace edgeformer {
namespace {

#include "lanes_neon.inl"

struct S : Lanes {
  static constexpr int kGemvRows = 4, kFewRows = 8, kTileRows = 4, kTilePanels = 1, kF32Rows = 4;
  static constexpr int kKeyTiles = 1, kValueRows = 4, kValueColumns = 1, kValueSums = 4;
  static constexpr int64_t kPrefetch = 1024;
};

#include "simd.inl"

// A block of a panel in SMMLA's order: 4 octets of columns x 8 pairs of rows x 16 bytes, then scales as in kTileBlock.
template <class Q>
inline void unpack_pairs(const uint8_t* packed, uint8_t* tile) {
  alignas(64) uint8_t plain[kTileBlock];
  unpack_block<Q>(packed, plain);
  for (int octet = 0; octet < 4; octet++) {
    for (int j = 0; j < 4; j++) {  // rows 4 j .. 4 j + 3 of 4 columns in each register
      const uint32x4_t low = vreinterpretq_u32_u8(vld1q_u8(plain + 128 * octet + 16 * j));
      const uint32x4_t high = vreinterpretq_u32_u8(vld1q_u8(plain + 128 * octet + 64 + 16 * j));
      vst1q_u8(tile + 128 * octet + 32 * j, vreinterpretq_u8_u32(vzip1q_u32(low, high)));
      vst1q_u8(tile + 128 * octet + 32 * j + 16, vreinterpretq_u8_u32(vzip2q_u32(low, high)));
    }
  }
  __builtin_memcpy(tile + 512, plain + 512, 128);
}

// Octets [begin, end) of a block against 2 P rows of activations: dot[r] has the 16 rows of the panel, in order.
template <int P>
inline __attribute__((always_inline)) void pair_dots(const uint8_t* tile, const int8_t* xq, int64_t ldq, int begin,
                                                     int end, I (&dot)[2 * P]) {
  int32x4_t sum[P][8];  // [w row a . x0, a . x1, b . x0, b . x1]
  for (int p = 0; p < P; p++)
    for (int j = 0; j < 8; j++) sum[p][j] = vdupq_n_s32(0);
  for (int octet = begin; octet < end; octet++) {
    int8x16_t x[P];
    for (int p = 0; p < P; p++)
      x[p] = vcombine_s8(vld1_s8(xq + 2 * p * ldq + 8 * octet), vld1_s8(xq + (2 * p + 1) * ldq + 8 * octet));
    for (int j = 0; j < 8; j++) {
      const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(tile + 128 * octet + 16 * j));
      for (int p = 0; p < P; p++) sum[p][j] = vmmlaq_s32(sum[p][j], w, x[p]);
    }
  }
  for (int p = 0; p < P; p++)
    for (int j = 0; j < 4; j++) {
      dot[2 * p].v[j] = vuzp1q_s32(sum[p][2 * j], sum[p][2 * j + 1]);
      dot[2 * p + 1].v[j] = vuzp2q_s32(sum[p][2 * j], sum[p][2 * j + 1]);
    }
}

// 2 P rows of activations against the unpacked blocks of one panel, in the order of kernels.h.
template <class Q, int P>
inline void pair_rows(const LinearArgs& a, const uint8_t* tile, int64_t tile_blocks, int64_t first_block, int64_t row,
                      float* y, int64_t lanes) {
  const int64_t blocks = blocks_of(a.k), ldq = blocks * kBlock;
  F acc[2 * P];
  for (int r = 0; r < 2 * P; r++) acc[r] = first_block ? load_tail(y + (row + r) * a.ldy, lanes) : f16(0.0f);
  for (int64_t g = 0; g < tile_blocks; g++, tile += kTileBlock) {
    const int8_t* xq = a.xq + (row * blocks + first_block + g) * kBlock;
    const XBlock* xb = a.xb + row * blocks + first_block + g;
    const TileBlock<Q> block = {tile};
    I dot[2 * P];
    if constexpr (Q::kHalves) {
      pair_dots<P>(tile, xq, ldq, 0, 2, dot);
      for (int r = 0; r < 2 * P; r++)
        acc[r] = S::fma(S::to_float(dot[r]), S::mul(f16(xb[r * blocks].scale), block.scale()), acc[r]);
      pair_dots<P>(tile, xq, ldq, 2, 4, dot);
    } else {
      pair_dots<P>(tile, xq, ldq, 0, 4, dot);
    }
    const F ws = Q::kHalves ? block.second() : block.scale();
    for (int r = 0; r < 2 * P; r++) {
      if constexpr (Q::kCentred) dot[r] = S::iadd(dot[r], S::iset1(xb[r * blocks].offset / 16));
      acc[r] = S::fma(S::to_float(dot[r]), S::mul(f16(xb[r * blocks].scale), ws), acc[r]);
      if constexpr (Q::kMinimum) acc[r] = S::fma(f16(xb[r * blocks].scaled_sum), block.second(), acc[r]);
    }
  }
  for (int r = 0; r < 2 * P; r++) store_tail(y + (row + r) * a.ldy, acc[r], lanes);
}

template <class Q>
inline void linear_pairs(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  if (a.m <= kSmallRows) return small_linear<Q>(a, panel_begin, panel_end);
  alignas(64) uint8_t pairs[kTileBlocks * kTileBlock];
  alignas(64) uint8_t plain[kTileBlocks * kTileBlock];
  const int64_t blocks = blocks_of(a.k), parts = (blocks + kTileBlocks - 1) / kTileBlocks;
  for (int64_t panel = panel_begin; panel < panel_end; panel++) {
    float* y = a.y + (panel - panel_begin) * kLanes;
    const int64_t lanes = a.n - panel * kLanes;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t first = blocks * part / parts, count = blocks * (part + 1) / parts - first;
      for (int64_t g = 0; g < count; g++) {
        const uint8_t* packed = static_cast<const uint8_t*>(a.w) + (panel * blocks + first + g) * Q::kBytes;
        unpack_pairs<Q>(packed, pairs + g * kTileBlock);
        if (a.m % 2) unpack_block<Q>(packed, plain + g * kTileBlock);
      }
      int64_t row = 0;
      for (; row + 4 <= a.m; row += 4) pair_rows<Q, 2>(a, pairs, count, first, row, y, lanes);
      for (; row + 2 <= a.m; row += 2) pair_rows<Q, 1>(a, pairs, count, first, row, y, lanes);
      if (row < a.m) tile_rows<Q, 1, 1>(a, plain, count, first, row, y, lanes);
    }
  }
}

}  // namespace

Kernels kernels_neon_i8mm(Kernels base) {
  base.isa = "neon_i8mm";
  base.linear[int(WeightType::q4a)] = linear_pairs<Q4a>;
  base.linear[int(WeightType::q4)] = linear_pairs<Q4>;
  base.linear[int(WeightType::q8)] = linear_pairs<Q8>;
  base.linear[int(WeightType::q8x16)] = linear_pairs<Q8x16>;
  return base;
}

}  // namespace edgeformer

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
