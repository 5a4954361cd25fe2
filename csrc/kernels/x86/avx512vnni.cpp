// The AVX-512 VNNI table: one zmm is 16 lanes, vpdpbusd does 64 multiply-adds, 32 registers hold an 8 x 2 panel tile.
// The linears of byte weights: avx512vnni_bytes.cpp.
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

Kernels kernels_avx512vnni() { return simd_table<Q4a, Q4, Q4x64>("avx512vnni"); }

}  // namespace edgeformer

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
