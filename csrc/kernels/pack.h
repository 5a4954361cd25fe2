// Packing: from the arrays of a model file to the panels of kernels.h. Done once, at load; plain code, any ISA.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

namespace edgeformer {

// Bytes of packed W[n, k], n padded to 16 rows and k to 32 columns; of wide blocks k is a multiple.
size_t packed_bytes(WeightType type, int64_t n, int64_t k);
// Bytes of one panel (16 rows); panel p starts at p * panel_bytes.
size_t panel_bytes(WeightType type, int64_t k);

struct PackSource {
  // q4, q4x64, q4a: INT4 as ONNX stores it, element r * k + c in the low nibble of byte (r * k + c) / 2 if even, else
  // the high;
  //          signed, -8..7 (q4a: the stored value is q - 8).
  // q8, q8x16, q8x128: int8 [n, k].  f32: float [n, k].
  const void* q;
  const float* scale;  // [n, ceil(k / block)]; packed as fp16, to nearest even
  const float* min;    // q4a only: [n, ceil(k / block)], the minimum m of w = s * q + m with q in 0..15; as the scales
  int64_t n, k;
  int64_t block;  // 32, 64, 128, ...: a multiple of 32; q8x16: 16; q4x64, q8x128: a multiple of 64, of 128
};

// The first two: not finite, or 65520 and more, which fp16 cannot hold.
enum class PackError { none, scale_beyond_fp16, min_beyond_fp16, weight_below_minus_127 };

struct PackResult {
  PackError error = PackError::none;
  bool rounded = false;  // some scale or minimum had no exact fp16 value
};

// Packs the source rows [row_begin, row_end). Source row r becomes packed row dest[r] (dest null: r itself), so that
// several sources can share one packed matrix, interleaved in any way; two calls may run at once if no two of their
// packed rows are equal. The packed memory must be zero before: rows never written give y = 0.
PackResult pack_rows(WeightType type, const PackSource& source, int64_t row_begin, int64_t row_end, const int64_t* dest,
                     void* packed);

// One packed row as floats, y[k]: an embedding row out of a tied head. The value is float(q) * s; q4a: fma(q, s, m).
void unpack_row(WeightType type, const void* packed, int64_t k, int64_t row, float* y);

// Zeroed memory, 2 MiB aligned when large, with huge pages asked for; null if there is none. Not touched before its
// use.
void* pages_alloc(size_t bytes);
void pages_free(void* p, size_t bytes);

}  // namespace edgeformer
