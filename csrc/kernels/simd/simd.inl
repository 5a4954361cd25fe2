// The SIMD kernels, written once over a struct S that each ISA file defines before including this file.
//
// All of S's vectors have 16 lanes (one zmm, two ymm, four q registers), so the order of every float sum is the same in
// each ISA and equal to the formulas in kernels.h. S has:
//   F, I              16 floats, 16 int32
//   load store load_n store_n (n in 1..15: touches nothing beyond) set1 add sub mul div sqrt fma(a,b,c)=a*b+c
//   max(a,b) = a > b ? a : b, min likewise (b where either is NaN), select_lt(a,b,x,y) = a < b ? x : y
//   abs neg with_sign, bits/from_bits, isub iadd ishl23 imax iset1, to_int (nearest even), to_float, s8 (16 int8 -> F)
//   half (16 fp16 -> F), narrow (16 int32 in -128..127 -> 16 bytes), sum (the tree), isum, imaximum
//   put_blocks(p, q, a, b, c, d, sums): a and b narrowed at p, c and d at q (values -127..127), and the isum of each
//   tops4 (imaximum of 4 -> Quad, as floats), top_of<2 or 4> (of each two, or of all, in their places), join (4 Quads
//   -> F) kPowers: whether there are fraction(x) = x - round(x) and times_power<bounded>(p, x, fraction) = p *
//   2^round(x), 0
//     below -126 unless bounded
//   Weights: W holds 4 columns of 16 rows as bytes; byte_weight(p) -> W (from q + 128). X gives 16 columns of one
//     activation row, as 4 steps.
//     ByteSum: bzero(offset), bdot<step>(sum, W, X), bsum(sum) -> I
//     bzero takes -128 * sum of x where W is unsigned, and ignores it where byte_weight gives signed bytes
//   what the linears want beside: simd_linear.inl (x86), neon_linear.inl
//   Pairs: 16 columns of two tokens' values as int16; load_pairs(32 bytes), pdot(I, Pairs, two int16 in an int32) -> I
//   put_every_second(32 bytes, 16 bytes, first): the bytes first, first + 2, ... become these
//   narrow16 (16 int32 in -32768..32767 -> 16 int16)
//   kGemvRows, kF32Rows: how many rows of activations fit the registers; kKeyTiles: tiles of keys that kGemvRows query
//   rows meet at once; kValueRows, kValueColumns: most query rows and 16-column parts of the values at once,
//   kValueSums: most of their product
// The including file has opened its target region and an anonymous namespace.

using F = S::F;
using I = S::I;

inline F load_tail(const float* p, int64_t n) { return n >= 16 ? S::load(p) : S::load_n(p, int(n)); }
inline void store_tail(float* p, F v, int64_t n) { n >= 16 ? S::store(p, v) : S::store_n(p, v, int(n)); }

template <int N>
struct Count {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

// body(0), ..., body(N - 1), each with a compile-time index. GCC keeps a loop's array of registers in memory otherwise:
// it unrolls such loops only after it has decided what may be a register.
template <int N, class Body>
inline __attribute__((always_inline)) void each(Body body) {
  if constexpr (N > 0) {
    each<N - 1>(body);
    body(Count<N - 1>{});
  }
}

// Calls body with `count` (1..N) as a compile-time constant.
template <int N, class Body>
inline void with_count(int64_t count, Body body) {
  if constexpr (N > 1) {
    if (count < N) return with_count<N - 1>(count, body);
  }
  body(Count<N>{});
}

#include "kernels/simd/simd_math.inl"

#include "kernels/simd/simd_quantize.inl"

// ---- linears ------------------------------------------------------------------------------------------------------

// What differs between the weight types, over a block at p: packed (as in memory) or an unpacked tile.
struct Q4a {
  static constexpr int64_t kBytes = 320, kHead = 64, kParts = 1;
  static constexpr bool kNibbles = true, kMinimum = true, kHalves = false, kCentred = false;
};
struct Q4 {
  static constexpr int64_t kBytes = 288, kHead = 32, kParts = 1;
  static constexpr bool kNibbles = true, kMinimum = false, kHalves = false, kCentred = true;
};
struct Q8 {
  static constexpr int64_t kBytes = 544, kHead = 32, kParts = 1;
  static constexpr bool kNibbles = false, kMinimum = false, kHalves = false, kCentred = false;
};
struct Q8x16 {
  static constexpr int64_t kBytes = 576, kHead = 64, kParts = 1;
  static constexpr bool kNibbles = false, kMinimum = false, kHalves = true, kCentred = false;
};
struct Q4x64 {  // kParts: groups of 32 columns in a block
  static constexpr int64_t kBytes = 544, kHead = 32, kParts = 2;
  static constexpr bool kNibbles = true, kMinimum = false, kHalves = false, kCentred = true;
};
struct Q8x128 {
  static constexpr int64_t kBytes = 2112, kHead = 64, kParts = 4;
  static constexpr bool kNibbles = false, kMinimum = false, kHalves = false, kCentred = false;
};

// y = x * W of one weight type, as kernels.h has it: in simd_linear.inl (x86) and neon_linear.inl.
template <class Q>
inline void linear(const LinearArgs& a, int64_t panel_begin, int64_t panel_end);

template <int R>
inline void f32_rows(const LinearArgs& a, const float* w, int64_t row, float* y, int64_t lanes) {
  const float* x = a.x + row * a.ldx;
  F acc[R];
  for (int r = 0; r < R; r++) acc[r] = f16(0.0f);
  for (int64_t c = 0; c < a.k; c++) {
    const F wc = S::load(w + c * kLanes);
    for (int r = 0; r < R; r++) acc[r] = S::fma(f16(x[r * a.ldx + c]), wc, acc[r]);
  }
  for (int r = 0; r < R; r++) store_tail(y + (row + r) * a.ldy, acc[r], lanes);
}

inline void linear_f32(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  const int64_t passes = (a.m + S::kF32Rows - 1) / S::kF32Rows;
  for (int64_t panel = panel_begin; panel < panel_end; panel++) {
    const float* w = static_cast<const float*>(a.w) + panel * a.k * kLanes;
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t row = a.m * pass / passes, rows = a.m * (pass + 1) / passes - row;
      with_count<S::kF32Rows>(rows, [&](auto R) __attribute__((always_inline)) {
        f32_rows<decltype(R)::value>(a, w, row, a.y + (panel - panel_begin) * kLanes, a.n - panel * kLanes);
      });
    }
  }
}

#include "kernels/simd/simd_attention.inl"
#include "kernels/simd/simd_rows.inl"

// Everything above in one table.
inline Kernels simd_table(Kernels k, const char* isa) {
  k.isa = isa;
  k.quantize = quantize;
  k.linear[int(WeightType::q4a)] = linear<Q4a>;
  k.linear[int(WeightType::q4)] = linear<Q4>;
  k.linear[int(WeightType::q4x64)] = linear<Q4x64>;
  k.linear[int(WeightType::q8)] = linear<Q8>;
  k.linear[int(WeightType::q8x16)] = linear<Q8x16>;
  k.linear[int(WeightType::q8x128)] = linear<Q8x128>;
  k.linear[int(WeightType::f32)] = linear_f32;
  k.epilogue = epilogue;
  k.gated = gated;
  k.unary = unary;
  k.rms_norm = rms_norm;
  k.layer_norm = layer_norm;
  k.softmax = softmax;
  k.rope = rope;
  k.dequantize = dequantize;
  k.kv_append = kv_append;
  k.attention = attention;
  k.attention_partial = attention_partial;
  k.attention_merge = attention_merge;
  return k;
}
