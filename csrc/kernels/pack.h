// Packing: from the arrays of a model file to the panels of kernels.h. Once, at load; the same code for every ISA.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

namespace edgeformer {

// Bytes of packed W[n, k]: n padded to 16 rows, k to 32 columns. q4x64 and q8x128: k is a multiple of 64, of 128.
size_t packed_bytes(WeightType type, int64_t n, int64_t k);

// W[n, k] as a model file stores it. Element (r, c) has the index i = r * k + c.
//
//   type    q                              element        scale, min      block
//   q4      INT4 of ONNX, see below        -8 .. 7        scale           multiple of 32
//   q4x64   INT4 of ONNX                   -8 .. 7        scale           multiple of 64
//   q4a     INT4 of ONNX                   q - 8          scale and min   multiple of 32
//   q8      int8                           -127 .. 127    scale           multiple of 32
//   q8x16   int8                           -127 .. 127    scale           16
//   q8x128  int8                           -127 .. 127    scale           multiple of 128
//   f32     float                                         none            unused
//
// INT4 of ONNX: two elements a byte; byte i / 2 has element i in its low nibble if i is even, else in its high one.
struct PackSource {
  const void* q;
  const float* scale;  // [n, ceil(k / block)]; packed as fp16, rounded to nearest even
  const float* min;    // q4a: [n, ceil(k / block)], m of w = s * q + m with q in 0 .. 15; packed like the scales
  int64_t n, k;
  int64_t block;  // columns that share a scale
};

enum class PackError {
  none,
  scale_beyond_fp16,       // a scale is not finite, or its magnitude is 65520 or more
  min_beyond_fp16,         // the same of a minimum
  weight_below_minus_127,  // an int8 weight is -128: the AVX2 kernel negates weights, and 128 does not fit
};

struct PackResult {
  PackError error = PackError::none;
  bool rounded = false;  // some scale or minimum had no exact fp16 value
};

// Packs the source rows [row_begin, row_end). Source row r becomes packed row dest[r], or r if dest is null: several
// sources can share one packed matrix, interleaved in any way. Calls that write different packed rows may run at once.
// `packed` must be zero before the first call: rows that no call writes give y = 0.
PackResult pack_rows(WeightType type, const PackSource& source, int64_t row_begin, int64_t row_end, const int64_t* dest,
                     void* packed);

// y[k] = packed row `row` as floats: float(q) * s, for q4a fma(q, s, m). An embedding row of a tied head.
void unpack_row(WeightType type, const void* packed, int64_t k, int64_t row, float* y);

}  // namespace edgeformer
