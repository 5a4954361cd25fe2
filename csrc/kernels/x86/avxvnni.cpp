// The AVX-VNNI table: AVX2 with vpdpbusd on ymm (client CPUs without AVX-512).
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#include "kernels/scalar/scalar_math.h"  // inside the region: its fma is an instruction there

namespace edgeformer {
namespace {

#include "kernels/x86/lanes_avx2.inl"

struct S : Lanes {
  static constexpr bool kLongNibbleSums = true;
  static constexpr int kPackedRows = 6, kPackedPanels = 1, kTileRows = 5, kTilePanels = 1, kF32Rows = 4;
  static constexpr int kKeyRows = 4, kKeyTiles = 1, kValueRows = 2, kValueColumns = 2, kValueSums = 4;

  template <int index>
  static I dot(I s, W w, X x) {
    const __m256i v = step(x, index);
    return {_mm256_dpbusd_avx_epi32(s.a, w.a, v), _mm256_dpbusd_avx_epi32(s.b, w.b, v)};
  }

  static I pdot(I s, Pairs v, int32_t both) {
    const __m256i x = _mm256_set1_epi32(both);
    return {_mm256_dpwssd_avx_epi32(s.a, v.a, x), _mm256_dpwssd_avx_epi32(s.b, v.b, x)};
  }

  using NibbleSum = I;
  static NibbleSum nzero(int32_t c) { return iset1(c); }
  template <int index>
  static NibbleSum ndot(NibbleSum s, W w, X x) {
    return dot<index>(s, w, x);
  }
  static I nsum(NibbleSum s, int32_t) { return s; }

  using ByteSum = I;
  static W byte_weight(const uint8_t* p) { return load_w(p); }
  static ByteSum bzero(int32_t offset) { return iset1(offset); }
  template <int index>
  static ByteSum bdot(ByteSum s, W w, X x) {
    return dot<index>(s, w, x);
  }
  static I bsum(ByteSum s) { return s; }
};

#include "kernels/simd/simd.inl"
#include "kernels/simd/simd_linear.inl"

}  // namespace

Kernels kernels_avxvnni() { return simd_table<Q4a, Q4, Q4x64, Q8, Q8x16, Q8x128>("avxvnni"); }

}  // namespace edgeformer

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
