// The AVX2 table (with FMA and F16C): vpmaddubsw, whose int16 sums must not saturate.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels/scalar/scalar_math.h"  // inside the region: its fma is an instruction there

namespace edgeformer {
namespace {

#include "kernels/x86/lanes_avx2.inl"

struct S : Lanes {
  static constexpr bool kLongNibbleSums = false;
  static constexpr int kPackedRows = 5, kPackedPanels = 1, kTileRows = 4, kTilePanels = 1, kF32Rows = 4;
  static constexpr int kKeyRows = 4, kKeyTiles = 1, kValueRows = 2, kValueColumns = 2, kValueSums = 4;

  // A step of nibbles adds at most 2 * 15 * 127 to an int16: 8 steps (30480) fit before the sums are widened.
  using NibbleSum = I;
  static NibbleSum nzero(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  template <int index>
  static NibbleSum ndot(NibbleSum s, W w, X x) {
    const __m256i v = step(x, index);
    const __m256i a = _mm256_maddubs_epi16(w.a, v), b = _mm256_maddubs_epi16(w.b, v);
    return in_registers({_mm256_add_epi16(s.a, a), _mm256_add_epi16(s.b, b)});
  }
  static I nsum(NibbleSum s, int32_t c) {
    const __m256i one = _mm256_set1_epi16(1);
    return iadd({_mm256_madd_epi16(s.a, one), _mm256_madd_epi16(s.b, one)}, iset1(c));
  }

  // Bytes: |w| unsigned times x with w's sign, at most 2 * 127 * 127 = 32258 in an int16. q is never -128: -(-128) does
  // not fit.
  using ByteSum = I;
  static W byte_weight(const uint8_t* p) {
    const __m256i flip = _mm256_set1_epi8(char(0x80));
    return {_mm256_xor_si256(bytes(p), flip), _mm256_xor_si256(bytes(p + 32), flip)};
  }
  static ByteSum bzero(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  template <int index>
  static ByteSum bdot(ByteSum s, W w, X x) {
    const __m256i v = step(x, index), one = _mm256_set1_epi16(1);
    const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(w.a), _mm256_sign_epi8(v, w.a));
    const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(w.b), _mm256_sign_epi8(v, w.b));
    return in_registers(
        {_mm256_add_epi32(s.a, _mm256_madd_epi16(a, one)), _mm256_add_epi32(s.b, _mm256_madd_epi16(b, one))});
  }
  static I bsum(ByteSum s) { return s; }
};

#include "kernels/simd/simd.inl"
#include "kernels/simd/simd_linear.inl"

}  // namespace

Kernels kernels_avx2() { return simd_table<Q4a, Q4, Q4x64, Q8, Q8x16, Q8x128>("avx2"); }

}  // namespace edgeformer

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
