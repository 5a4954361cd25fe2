// The NEON table for CPUs with SDOT (Armv8.2 dot product): Cortex-A76 and later, every Apple arm64, Jetson Orin.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#pragma GCC optimize("no-schedule-insns")  // it hoists loads before registers are allocated, and spills
#endif

#include "kernels/scalar/scalar_math.h"

namespace edgeformer {
namespace {

#include "kernels/arm/lanes_neon.inl"

struct S : Lanes {
  static constexpr int kKeyRows = 4, kF32Rows = 4, kDirectRows = 4, kTileRows = 3;
  static constexpr int kKeyTiles = 1, kValueRows = 4, kValueColumns = 1, kValueSums = 4;
  static constexpr int64_t kPrefetch = 1024;
};

#include "kernels/simd/simd.inl"

#include "kernels/arm/neon_linear.inl"

// An unpacked block in the order of its use: signed bytes, then scales (and minima) as floats. q8x16: the scales of the
// columns 0 .. 15 are behind the bytes of these columns.
template <class Q>
struct TileBlock {
  static constexpr int64_t kBytes = 512 * Q::kParts + 64 + (Q::kMinimum || Q::kHalves ? 64 : 0);
};

template <class Q>
inline __attribute__((always_inline)) void unpack_block(const uint8_t* packed, uint8_t* tile) {
  const uint8_t* w = packed + Q::kHead;
  if constexpr (Q::kNibbles) {
    for (int part = 0; part < Q::kParts; part++) {
      uint8_t* high = tile + 256;
      each<4>([&](auto) __attribute__((always_inline)) {
        const S::W both = take(w);
        put(tile, S::low_nibbles<Q::kCentred>(both));
        put(high, S::high_nibbles<Q::kCentred>(both));
      });
      tile = high;
    }
  } else {
    for (int part = 0; part < Q::kParts; part++) {
      each<8>([&](auto s) __attribute__((always_inline)) {
        if constexpr (Q::kHalves && s.value == 4) put_floats(tile, S::half(packed));
        put(tile, take(w));
      });
    }
  }
  if constexpr (!Q::kHalves) put_floats(tile, S::half(packed));
  if constexpr (Q::kMinimum || Q::kHalves) put_floats(tile, S::half(packed + 32));
}

template <class Q, int R>
inline __attribute__((always_inline)) void tile_rows(const LinearArgs& a, const Tile& tile, int64_t row, float* y,
                                                     int64_t lanes) {
  const uint8_t* from = tile.data;
  const int64_t blocks = blocks_of(a.k);
  const int8_t* xq[R];
  const XBlock* xb[R];
  F acc[R];
  each<R>([&](auto r) __attribute__((always_inline)) {
    xq[r] = a.xq + ((row + r) * blocks + tile.first) * kBlock;
    xb[r] = a.xb + (row + r) * blocks + tile.first;
    acc[r] = tile.first ? load_tail(y + (row + r) * a.ldy, lanes) : f16(0.0f);
  });
  for (int64_t g = 0; g < tile.count; g++) {
    S::X x[R];
    I sum[R];
    each<R>([&](auto r) __attribute__((always_inline)) { sum[r] = S::iset1(0); });
    const auto dots = [&](int column) __attribute__((always_inline)) {  // column .. column + 15
      each<R>([&](auto r) __attribute__((always_inline)) { x[r] = S::load_x(xq[r] + column); });
      each<4>([&](auto s) __attribute__((always_inline)) {
        const S::W w = take(from);
        each<R>([&](auto r) __attribute__((always_inline)) { sum[r] = S::bdot<s.value>(sum[r], w, x[r]); });
      });
    };
    const auto add = [&](F ws) __attribute__((always_inline)) {
      each<R>([&](auto r) __attribute__((always_inline)) {
        acc[r] = S::fma(S::to_float(sum[r]), S::mul(f16(xb[r]->scale), ws), acc[r]);
      });
    };
    dots(0);
    if constexpr (Q::kHalves) {
      add(take_floats(from));
      each<R>([&](auto r) __attribute__((always_inline)) { sum[r] = S::iset1(0); });
    }
    each<2 * Q::kParts - 1>([&](auto i) __attribute__((always_inline)) { dots(16 * i + 16); });
    add(take_floats(from));
    if constexpr (Q::kMinimum) {
      const F wm = take_floats(from);
      each<R>([&](auto r) __attribute__((always_inline)) { acc[r] = S::fma(f16(xb[r]->scaled_sum), wm, acc[r]); });
    }
    each<R>([&](auto r) __attribute__((always_inline)) { xq[r] += kBlock * Q::kParts, xb[r] += Q::kParts; });
  }
  each<R>([&](auto r) __attribute__((always_inline)) { store_tail(y + (row + r) * a.ldy, acc[r], lanes); });
}

}  // namespace

Kernels kernels_neon_dotprod() { return simd_table<Q4a, Q4, Q4x64, Q8, Q8x16, Q8x128>("neon_dotprod"); }

}  // namespace edgeformer

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
