// The NEON table for CPUs with SDOT (Armv8.2 dot product): Cortex-A76 and later, every Apple arm64, Jetson Orin.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "scalar_math.h"

namespace edgeformer {
namespace {

#include "lanes_neon.inl"

struct S : Lanes {
  static constexpr int kGemvRows = 4, kFewRows = 8, kTileRows = 3, kTilePanels = 1, kF32Rows = 4;
  static constexpr int kKeyTiles = 1, kValueRows = 4, kValueColumns = 1, kValueSums = 4;
  static constexpr int64_t kPrefetch = 1024;
};

#include "simd.inl"

}  // namespace

Kernels kernels_neon_dotprod(Kernels base) { return simd_table(base, "neon_dotprod"); }

}  // namespace edgeformer

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
