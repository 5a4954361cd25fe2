// The SIMD kernels, written once over a struct S of primitives. A table's file opens its target region and an anonymous
// namespace, defines S, includes this file, and then its linears: simd_linear.inl on x86, neon_linear.inl on ARM.
//
// Every vector has 16 lanes (one zmm, two ymm or four q registers), so the order of each float sum is the same in every
// ISA and equal to the formulas of kernels.h. l is a lane, 0 .. 15.
//
// Types     F       16 floats
//           I       16 int32
//           W       weights: 4 columns of 16 rows, 64 bytes
//           X       activations: 16 columns of one row, int8, used as 4 steps of 4 columns
//           Pairs   values of the KV cache: 16 columns of two tokens, as int16
//           Quad    4 floats
//           ByteSum, NibbleSum   16 int32 dot products under way
//
// Memory    load(p) -> F, store(p, F)              16 floats, any alignment
//           load_n(p, n) -> F, store_n(p, F, n)    n in 1 .. 15 floats; touches nothing beyond, load_n fills with 0
//           half(p) -> F                           16 fp16
//           narrow(p, I)                           16 int8; the lanes are in -128 .. 127
//           narrow16(p, I)                         16 int16; the lanes are in -32768 .. 32767
//
// Floats    set1(v)                 v in every lane
//           add sub mul div sqrt    IEEE, rounded to nearest even
//           fma(a, b, c)            a * b + c, rounded once
//           max(a, b)               a > b ? a : b    b if either is NaN
//           min(a, b)               a < b ? a : b    b if either is NaN
//           select_lt(a, b, x, y)   a < b ? x : y
//           at_least(a, b) -> uint32  bit l: a[l] >= b[l]    0 if either is NaN
//           abs(a), neg(a)          sign bit cleared, flipped
//           with_sign(a, s)         |a| with the sign of s
//           sum(F) -> float         s[l] += s[l + 8], then + 4, + 2, + 1: s[0]
//           maximum(F) -> float     the largest lane
//
// Integers  iset1(v), iadd(a, b), imax(a, b), ishl23(a) = a << 23
//           bits(F) -> I, from_bits(I) -> F       the same bits
//           to_int(F) -> I                        nearest even
//           to_float(I) -> F
//           isum(I) -> int32, imaximum(I) -> int32
//
// Powers    kPowers                 true: there are these two (only exp2_of_negative16 uses them)
//           fraction(x)             x - round_to_even(x)
//           times_power<bounded>(p, x, fraction)  p * 2^round(x); 0 if x < -126, unless bounded (then x >= -126)
//
// Quantize  tops4(a, b, c, d) -> Quad             imaximum of each, its bits as a float
//           top_of<2>(Quad), top_of<4>(Quad)      the maximum of each two, of all four, in the place of each
//           join(Quad, Quad, Quad, Quad) -> F
//           put_blocks(p, q, a, b, c, d, sums)    a, b as 32 int8 at p; c, d as 32 int8 at q; sums[4]: isum of each;
//                                                 the lanes are in -127 .. 127
//
// Dots      byte_weight(p) -> W             64 packed bytes q + 128, as the dot product of this ISA takes them
//           load_x(p) -> X                  16 int8
//           bzero(offset) -> ByteSum        the start: offset (-128 * sum of x) if W is unsigned, 0 if signed
//           bdot<step>(s, W, X) -> ByteSum  s[l] += sum over c in 0 .. 3 of w[l][c] * x[4 * step + c]
//           bsum(ByteSum) -> I              sum of q * x
//
// Values    load_pairs(p) -> Pairs                32 int8: column by column, the first token's, the second's
//           pdot(I s, Pairs v, int32 w) -> I      s[l] += low(w) * v[l][0] + high(w) * v[l][1], low and high int16
//           put_every_second(p, q, first)         p[2 * l + first] = q[l], first in 0 .. 1; the other bytes stay
//
// Register budgets, in vectors of F or I:
//           kF32Rows        rows of activations in one pass over f32 weights
//           kKeyRows        query rows in one pass over keys
//           kKeyTiles       tiles of 16 keys that they meet at once
//           kValueRows, kValueColumns, kValueSums
//                           query rows, 16-column parts of the values, and the most sums of both, in one pass

using F = S::F;
using I = S::I;

inline F load_tail(const float* p, int64_t n) { return n >= 16 ? S::load(p) : S::load_n(p, int(n)); }
inline void store_tail(float* p, F v, int64_t n) { n >= 16 ? S::store(p, v) : S::store_n(p, v, int(n)); }

template <int N>
struct Count {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

// Calls body(0), ..., body(N - 1), each with a compile-time index. In a plain loop GCC keeps an array of vectors in
// memory: it unrolls the loop only after it has decided what may be a register.
template <int N, class Body>
inline __attribute__((always_inline)) void each(Body body) {
  if constexpr (N > 0) {
    each<N - 1>(body);
    body(Count<N - 1>{});
  }
}

// Calls body with `count` (least .. N) as a compile-time constant.
template <int N, int least = 1, class Body>
inline void with_count(int64_t count, Body body) {
  if constexpr (N > least) {
    if (count < N) return with_count<N - 1, least>(count, body);
  }
  body(Count<N>{});
}

// The fewest rows of a pass, where more than `few` rows are divided evenly over passes of at most `most`. What no pass
// can have is not compiled. Beyond few + most * most rows there are more than `most` passes, of at least most - 1 rows.
constexpr int fewest_rows(int few, int most) {
  int fewest = most;
  for (int m = few + 1; m <= few + most * most; m++) {
    const int rows = m / ((m + most - 1) / most);
    fewest = rows < fewest ? rows : fewest;
  }
  return fewest;
}
static_assert(fewest_rows(24, 8) == 6 && fewest_rows(8, 5) == 3 && fewest_rows(8, 4) == 3);

#include "kernels/simd/simd_math.inl"
#include "kernels/simd/simd_quantize.inl"

// ---- linears ------------------------------------------------------------------------------------------------------

// What differs between the weight types: a template argument Q of the linears.
//   kType     its WeightType
//   kBytes    of a packed block: kHead and the weights
//   kHead     bytes of fp16 scales (and minima) before the weights
//   kParts    groups of 32 columns in a block; more than 1: a wide block
//   kNibbles  two weights a byte
//   kMinimum  w = s * q + m: 16 fp16 minima behind the scales
//   kHalves   a scale for each 16 columns: 16 fp16 scales of the columns 16 .. 31 behind the others
//   kCentred  nibbles are q + 8
struct Q4a {
  static constexpr WeightType kType = WeightType::q4a;
  static constexpr int64_t kBytes = 320, kHead = 64, kParts = 1;
  static constexpr bool kNibbles = true, kMinimum = true, kHalves = false, kCentred = false;
};
struct Q4 {
  static constexpr WeightType kType = WeightType::q4;
  static constexpr int64_t kBytes = 288, kHead = 32, kParts = 1;
  static constexpr bool kNibbles = true, kMinimum = false, kHalves = false, kCentred = true;
};
struct Q8 {
  static constexpr WeightType kType = WeightType::q8;
  static constexpr int64_t kBytes = 544, kHead = 32, kParts = 1;
  static constexpr bool kNibbles = false, kMinimum = false, kHalves = false, kCentred = false;
};
struct Q8x16 {
  static constexpr WeightType kType = WeightType::q8x16;
  static constexpr int64_t kBytes = 576, kHead = 64, kParts = 1;
  static constexpr bool kNibbles = false, kMinimum = false, kHalves = true, kCentred = false;
};
struct Q4x64 {
  static constexpr WeightType kType = WeightType::q4x64;
  static constexpr int64_t kBytes = 544, kHead = 32, kParts = 2;
  static constexpr bool kNibbles = true, kMinimum = false, kHalves = false, kCentred = true;
};
struct Q8x128 {
  static constexpr WeightType kType = WeightType::q8x128;
  static constexpr int64_t kBytes = 2112, kHead = 64, kParts = 4;
  static constexpr bool kNibbles = false, kMinimum = false, kHalves = false, kCentred = false;
};

// y = x * W of one weight type: the formula at LinearFn in kernels.h. Defined in simd_linear.inl or neon_linear.inl.
template <class Q>
inline void linear(const LinearArgs& a, int64_t panel_begin, int64_t panel_end);

// y[row + r, l] = fma over c ascending of x[row + r, c] * w[c, l], for R rows and one panel w[k, 16].
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

template <class... Q>
inline void set_linears(Kernels& k) {
  ((k.linear[int(Q::kType)] = linear<Q>), ...);
}

// A table of the kernels above, with the linears of the weight types Q and of f32.
template <class... Q>
inline Kernels simd_table(const char* isa) {
  Kernels k = {};
  k.isa = isa;
  set_linears<Q...>(k);
  k.linear[int(WeightType::f32)] = linear_f32;
#define EDGEFORMER_SET(name) k.name = name;
  EDGEFORMER_KERNELS(EDGEFORMER_SET)
#undef EDGEFORMER_SET
  return k;
}
