// The NEON table for CPUs with SMMLA (Armv8.6 i8mm): Neoverse V1, Cortex-X2 and later. Only its linears of
// quantized weights differ from the SDOT table.
//
// SMMLA multiplies 2 x 8 bytes by 8 x 2 and adds to a 2 x 2 int32: twice SDOT's work. A tile is unpacked once into
// SMMLA's operand order (two weight rows x 8 columns in 16 bytes); the other operand is two rows of activations. Sums,
// scales and accumulators keep SMMLA's order, [row a . x0, a . x1, b . x0, b . x1], until y is written.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#pragma GCC optimize("no-schedule-insns")  // it hoists loads before registers are allocated, and spills
#endif

#include "kernels/scalar/scalar_math.h"

namespace edgeformer {
namespace {

#include "kernels/arm/lanes_neon.inl"

struct S : Lanes {
  static constexpr int kKeyRows = 4, kF32Rows = 4, kDirectRows = 4, kTileRows = 2;
  static constexpr int kKeyTiles = 1, kValueRows = 4, kValueColumns = 1, kValueSums = 4;
  static constexpr int64_t kPrefetch = 1024;
};

#include "kernels/simd/simd.inl"

#include "kernels/arm/neon_linear.inl"

// An unpacked block: 4 octets of columns x 8 pairs of rows x 16 bytes, then 32 scales (and 32 minima) in SMMLA's order.
// q8x16: the scales of the columns 0 .. 15 are behind the first two octets.
template <class Q>
struct TileBlock {
  static constexpr int64_t kBytes = 512 * Q::kParts + 128 + (Q::kMinimum || Q::kHalves ? 128 : 0);
};

// 16 floats -> 32, each twice: for the two rows of activations.
inline __attribute__((always_inline)) void put_twice(uint8_t*& to, F v) {
  put_floats(to, {vzip1q_f32(v.v[0], v.v[0]), vzip2q_f32(v.v[0], v.v[0]), vzip1q_f32(v.v[1], v.v[1]),
                  vzip2q_f32(v.v[1], v.v[1])});
  put_floats(to, {vzip1q_f32(v.v[2], v.v[2]), vzip2q_f32(v.v[2], v.v[2]), vzip1q_f32(v.v[3], v.v[3]),
                  vzip2q_f32(v.v[3], v.v[3])});
}

// Two slices (4 columns of 16 rows each) -> one octet of columns.
inline __attribute__((always_inline)) void put_octet(uint8_t*& to, S::W low, S::W high) {
  S::W rows[2];
  each<4>([&](auto j) __attribute__((always_inline)) {
    const int32x4_t a = vreinterpretq_s32_s8(low.v[j]), b = vreinterpretq_s32_s8(high.v[j]);
    rows[j / 2].v[j % 2 * 2] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    rows[j / 2].v[j % 2 * 2 + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
  });
  put(to, rows[0]);
  put(to, rows[1]);
}

template <class Q>
inline __attribute__((always_inline)) void unpack_block(const uint8_t* packed, uint8_t* tile) {
  const uint8_t* w = packed + Q::kHead;
  if constexpr (Q::kNibbles) {
    for (int part = 0; part < Q::kParts; part++) {
      uint8_t* high = tile + 256;
      each<2>([&](auto) __attribute__((always_inline)) {
        const S::W a = take(w), b = take(w);
        put_octet(tile, S::low_nibbles<Q::kCentred>(a), S::low_nibbles<Q::kCentred>(b));
        put_octet(high, S::high_nibbles<Q::kCentred>(a), S::high_nibbles<Q::kCentred>(b));
      });
      tile = high;
    }
  } else {
    for (int part = 0; part < Q::kParts; part++) {
      each<4>([&](auto octet) __attribute__((always_inline)) {
        if constexpr (Q::kHalves && octet.value == 2) put_twice(tile, S::half(packed));
        const S::W a = take(w), b = take(w);
        put_octet(tile, a, b);
      });
    }
  }
  if constexpr (!Q::kHalves) put_twice(tile, S::half(packed));
  if constexpr (Q::kMinimum || Q::kHalves) put_twice(tile, S::half(packed + 32));
}

// See neon_linear.inl. R = 1: both halves of an operand are the same row, which is stored once.
template <class Q, int R>
inline __attribute__((always_inline)) void tile_rows(const LinearArgs& a, const Tile& tile, int64_t row, float* y,
                                                     int64_t lanes) {
  const uint8_t* from = tile.data;
  const int64_t blocks = blocks_of(a.k);
  const int8_t *x0 = a.xq + (row * blocks + tile.first) * kBlock, *x1 = x0 + (R - 1) * blocks * kBlock;
  const XBlock *b0 = a.xb + row * blocks + tile.first, *b1 = b0 + (R - 1) * blocks;
  float* const y0 = y + row * a.ldy;
  float* const y1 = y0 + (R - 1) * a.ldy;
  float32x4_t acc[8];
  if (tile.first) {
    const F v0 = load_tail(y0, lanes), v1 = load_tail(y1, lanes);
    each<4>([&](auto j) __attribute__((always_inline)) {
      acc[2 * j] = vzip1q_f32(v0.v[j], v1.v[j]);
      acc[2 * j + 1] = vzip2q_f32(v0.v[j], v1.v[j]);
    });
  } else {
    each<8>([&](auto j) __attribute__((always_inline)) { acc[j] = vdupq_n_f32(0.0f); });
  }
  for (int64_t g = 0; g < tile.count; g++) {
    int32x4_t sum[8];
    const auto octet = [&](int64x2_t x) __attribute__((always_inline)) {
      each<2>([&](auto half) __attribute__((always_inline)) {
        const S::W w = take(from);
        each<4>([&](auto j) __attribute__((always_inline)) {
          sum[4 * half + j] = vmmlaq_s32(sum[4 * half + j], w.v[j], vreinterpretq_s8_s64(x));
        });
      });
    };
    const auto dots = [&]() __attribute__((always_inline)) {  // 16 columns
      const int64x2_t low = vreinterpretq_s64_s8(vld1q_s8(x0)), high = vreinterpretq_s64_s8(vld1q_s8(x1));
      x0 += 16, x1 += 16;
      octet(vzip1q_s64(low, high));
      octet(vzip2q_s64(low, high));
    };
    const auto zero = [&]() __attribute__((always_inline)) {
      each<8>([&](auto j) __attribute__((always_inline)) { sum[j] = vdupq_n_s32(0); });
    };
    // [scale of x0, of x1, scaled sum of x0, of x1]
    const float32x4_t both = vzip1q_f32(vld1q_f32(&b0->scale), vld1q_f32(&b1->scale));
    const float32x4_t scales = vreinterpretq_f32_f64(vdupq_laneq_f64(vreinterpretq_f64_f32(both), 0));
    const auto add = [&]() __attribute__((always_inline)) {
      each<2>([&](auto half) __attribute__((always_inline)) {
        const F ws = take_floats(from);
        each<4>([&](auto j) __attribute__((always_inline)) {
          float32x4_t& to = acc[4 * half + j];
          to = vfmaq_f32(to, vcvtq_f32_s32(sum[4 * half + j]), vmulq_f32(scales, ws.v[j]));
        });
      });
    };
    zero();
    dots();
    if constexpr (Q::kHalves) {
      add();
      zero();
    }
    dots();
    for (int part = 1; part < Q::kParts; part++) {
      dots();
      dots();
    }
    add();
    if constexpr (Q::kMinimum) {
      const float32x4_t sums = vreinterpretq_f32_f64(vdupq_laneq_f64(vreinterpretq_f64_f32(both), 1));
      each<2>([&](auto half) __attribute__((always_inline)) {
        const F wm = take_floats(from);
        each<4>([&](auto j) __attribute__((always_inline)) {
          acc[4 * half + j] = vfmaq_f32(acc[4 * half + j], sums, wm.v[j]);
        });
      });
    }
    b0 += Q::kParts, b1 += Q::kParts;
  }
  F v0, v1;
  each<4>([&](auto j) __attribute__((always_inline)) {
    v0.v[j] = vuzp1q_f32(acc[2 * j], acc[2 * j + 1]);
    v1.v[j] = vuzp2q_f32(acc[2 * j], acc[2 * j + 1]);
  });
  store_tail(y0, v0, lanes);
  if constexpr (R == 2) store_tail(y1, v1, lanes);
}

}  // namespace

Kernels kernels_neon_i8mm(Kernels k) {
  k.isa = "neon_i8mm";
  set_linears<Q4a, Q4, Q4x64, Q8, Q8x16, Q8x128>(k);
  return k;
}

}  // namespace edgeformer

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
