// The linears of q8, q8x16 and q8x128 of the AVX-512 VNNI table: a file of their own, because a compiler needs 1.3 GB for
// the whole table at once.
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own _mm512_undefined_*
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "kernels/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

#include "kernels/scalar/scalar_math.h"  // inside the region: its fma is an instruction there

namespace edgeformer {
namespace {

#include "kernels/x86/lanes_avx512.inl"

#include "kernels/simd/simd.inl"
#include "kernels/simd/simd_linear.inl"

}  // namespace

Kernels kernels_avx512vnni_bytes(Kernels k) {
  set_linears<Q8, Q8x16, Q8x128>(k);
  return k;
}

}  // namespace edgeformer

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
