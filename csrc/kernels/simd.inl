// The SIMD kernels, written once over a struct S that each ISA file defines before including this file.
//
// All of S's vectors have 16 lanes (one zmm, two ymm, four q registers), so the order of every float sum is the same in
// each ISA and equal to the formulas in kernels.h. S has:
//   F, I              16 floats, 16 int32
//   load store load_n store_n (n in 1..15: touches nothing beyond) set1 add sub mul div sqrt fma(a,b,c)=a*b+c
//   max(a,b) = a > b ? a : b, min likewise (b where either is NaN), select_lt(a,b,x,y) = a < b ? x : y
//   abs neg with_sign, bits/from_bits, isub iadd ishl23 imax iset1, to_int (nearest even), to_float, s8 (16 int8 -> F)
//   half (16 fp16 -> F), narrow (16 int32 in -128..127 -> 16 bytes), sums4 (of four I),
//   sum (the tree), isum, imaximum kPowers: whether there are fraction(x) = x - round(x) and times_power(p, x,
//   fraction) = p * 2^round(x), 0 below -126 Weights: W holds 4 columns of 16 rows as bytes. X gives 16 columns of one
//   activation row, as 4 steps.
//     nibble_low/high(p) -> W; byte_weight(p) -> W (from q + 128); load_w/store_w for unpacked tiles
//     NibbleSum: nzero(c), ndot<step>(sum, W, X), nsum(sum, c) -> I, c added by one of the two.
//     ByteSum: bzero(offset), bdot<step>, bsum(sum) -> I
//     bzero takes -128 * sum of x where W is unsigned, and ignores it where byte_weight gives signed bytes
//   Pairs: 16 columns of two tokens' values as int16; load_pairs(32 bytes), pdot(I, Pairs, two int16 in an int32) -> I
//   put_every_second(32 bytes, 16 bytes, first): the bytes first, first + 2, ... become these
//   narrow16 (16 int32 in -32768..32767 -> 16 int16)
//   kGemvRows, kTileRows, kTilePanels: how many rows of activations (and panels) fit the registers; up to kFewRows
//   rows, passes of kGemvRows over the packed bytes are faster than tiles
//   kKeyTiles: tiles of keys that kGemvRows query rows meet at once; kValueRows, kValueColumns: most query rows and
//   16-column parts of the values at once, kValueSums: most of their product
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

#include "simd_math.inl"

#include "simd_quantize.inl"

// ---- linears ------------------------------------------------------------------------------------------------------

// What differs between the weight types, over a block at p: packed (as in memory) or an unpacked tile.
struct Q4a {
  static constexpr int64_t kBytes = 320, kHead = 64;
  static constexpr bool kNibbles = true, kMinimum = true, kHalves = false, kCentred = false;
};
struct Q4 {
  static constexpr int64_t kBytes = 288, kHead = 32;
  static constexpr bool kNibbles = true, kMinimum = false, kHalves = false, kCentred = true;
};
struct Q8 {
  static constexpr int64_t kBytes = 544, kHead = 32;
  static constexpr bool kNibbles = false, kMinimum = false, kHalves = false, kCentred = false;
};
struct Q8x16 {
  static constexpr int64_t kBytes = 576, kHead = 64;
  static constexpr bool kNibbles = false, kMinimum = false, kHalves = true, kCentred = false;
};

// A packed block: scales are fp16, nibbles are unpacked on the way.
template <class Q>
struct PackedBlock {
  const uint8_t* p;
  template <int slice>
  S::W weights() const {
    if constexpr (!Q::kNibbles)
      return S::byte_weight(p + Q::kHead + 64 * slice);
    else if constexpr (slice < 4)
      return S::nibble_low(p + Q::kHead + 64 * slice);
    else
      return S::nibble_high(p + Q::kHead + 64 * (slice - 4));
  }
  F scale() const { return S::half(p); }
  F second() const { return S::half(p + 32); }  // q4a: minima, q8x16: scales of the upper half
};

// The same block unpacked for many rows of activations: 8 slices of W, then 16 scales and 16 "second" as floats.
constexpr int64_t kTileBlock = 512 + 128;
template <class Q>
struct TileBlock {
  const uint8_t* p;
  template <int slice>
  S::W weights() const {
    return S::load_w(p + 64 * slice);
  }
  F scale() const { return S::load(reinterpret_cast<const float*>(p + 512)); }
  F second() const { return S::load(reinterpret_cast<const float*>(p + 576)); }
};

// One step: slice `s` of P blocks against R rows, into R x P sums.
template <class Q, int s, int R, int P, class Block, class Sum>
inline __attribute__((always_inline)) void dot_slice(const Block (&block)[P], const S::X (&x)[R], Sum (&sum)[R][P]) {
  typename S::W w[P];
  each<P>([&](auto p) __attribute__((always_inline)) { w[p] = block[p].template weights<s>(); });
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<P>([&](auto p) __attribute__((always_inline)) {
      if constexpr (Q::kNibbles)
        sum[r][p] = S::template ndot<s % 4>(sum[r][p], w[p], x[r]);
      else
        sum[r][p] = S::template bdot<s % 4>(sum[r][p], w[p], x[r]);
    });
  });
}

// What undoes the + 8 of q4's nibbles: -8 * sum of x.
template <class Q>
inline int32_t centre(const XBlock& xb) {
  return Q::kCentred ? xb.offset >> 4 : 0;
}

// acc[R][P] += one 32-column block of P panels times R rows, in the order of kernels.h.
template <class Q, int R, int P, class Block>
inline __attribute__((always_inline)) void add_block(const Block (&block)[P], const int8_t* xq, const XBlock* xb,
                                                     int64_t ldq, int64_t ldb, F (&acc)[R][P]) {
  typename S::X x[R];
  const auto load = [&](int64_t column) __attribute__((always_inline)) {
    each<R>([&](auto r) __attribute__((always_inline)) { x[r] = S::load_x(xq + r * ldq + column); });
  };
  // acc += dot * (scale of the row * scale of the panel)
  const auto add = [&](int r, int p, I dot, F ws) __attribute__((always_inline)) {
    acc[r][p] = S::fma(S::to_float(dot), S::mul(f16(xb[r * ldb].scale), ws), acc[r][p]);
  };
  if constexpr (Q::kNibbles) {
    typename S::NibbleSum sum[R][P];
    each<R>([&](auto r) __attribute__((always_inline)) {
      each<P>([&](auto p) __attribute__((always_inline)) { sum[r][p] = S::nzero(centre<Q>(xb[r * ldb])); });
    });
    load(0);
    dot_slice<Q, 0, R, P>(block, x, sum);
    dot_slice<Q, 1, R, P>(block, x, sum);
    dot_slice<Q, 2, R, P>(block, x, sum);
    dot_slice<Q, 3, R, P>(block, x, sum);
    load(16);
    dot_slice<Q, 4, R, P>(block, x, sum);
    dot_slice<Q, 5, R, P>(block, x, sum);
    dot_slice<Q, 6, R, P>(block, x, sum);
    dot_slice<Q, 7, R, P>(block, x, sum);
    each<P>([&](auto p) __attribute__((always_inline)) {
      const F ws = block[p].scale();
      each<R>([&](auto r)
                  __attribute__((always_inline)) { add(r, p, S::nsum(sum[r][p], centre<Q>(xb[r * ldb])), ws); });
      if constexpr (Q::kMinimum) {
        const F wm = block[p].second();
        each<R>([&](auto r)
                    __attribute__((always_inline)) { acc[r][p] = S::fma(f16(xb[r * ldb].scaled_sum), wm, acc[r][p]); });
      }
    });
  } else {
    typename S::ByteSum sum[R][P];
    each<R>([&](auto r) __attribute__((always_inline)) {
      const int32_t offset = Q::kHalves ? xb[r * ldb].offset_low : xb[r * ldb].offset;
      each<P>([&](auto p) __attribute__((always_inline)) { sum[r][p] = S::bzero(offset); });
    });
    load(0);
    dot_slice<Q, 0, R, P>(block, x, sum);
    dot_slice<Q, 1, R, P>(block, x, sum);
    dot_slice<Q, 2, R, P>(block, x, sum);
    dot_slice<Q, 3, R, P>(block, x, sum);
    if constexpr (Q::kHalves) {
      each<P>([&](auto p) __attribute__((always_inline)) {
        const F ws = block[p].scale();
        each<R>([&](auto r) __attribute__((always_inline)) {
          add(r, p, S::bsum(sum[r][p]), ws);
          sum[r][p] = S::bzero(xb[r * ldb].offset - xb[r * ldb].offset_low);
        });
      });
    }
    load(16);
    dot_slice<Q, 4, R, P>(block, x, sum);
    dot_slice<Q, 5, R, P>(block, x, sum);
    dot_slice<Q, 6, R, P>(block, x, sum);
    dot_slice<Q, 7, R, P>(block, x, sum);
    each<P>([&](auto p) __attribute__((always_inline)) {
      const F ws = Q::kHalves ? block[p].second() : block[p].scale();
      each<R>([&](auto r) __attribute__((always_inline)) { add(r, p, S::bsum(sum[r][p]), ws); });
    });
  }
}

// One panel against R rows straight from the packed bytes: decoding, where memory sets the pace.
template <class Q, int R>
inline void panel_rows(const LinearArgs& a, const uint8_t* panel, int64_t row, float* y, int64_t lanes) {
  const int64_t blocks = blocks_of(a.k);
  F acc[R][1];
  each<R>([&](auto r) __attribute__((always_inline)) { acc[r][0] = f16(0.0f); });
  for (int64_t g = 0; g < blocks; g++) {
    const uint8_t* p = panel + g * Q::kBytes;
    for (int64_t line = 0; line < Q::kBytes; line += 64) __builtin_prefetch(p + line + S::kPrefetch, 0, 2);
    const PackedBlock<Q> block[1] = {{p}};
    add_block<Q, R, 1>(block, a.xq + (row * blocks + g) * kBlock, a.xb + row * blocks + g, blocks * kBlock, blocks,
                       acc);
  }
  each<R>([&](auto r) __attribute__((always_inline)) { store_tail(y + (row + r) * a.ldy, acc[r][0], lanes); });
}

// Calls body with `count` (1..N) as a compile-time constant.
template <int N, class Body>
inline void with_count(int64_t count, Body body) {
  if constexpr (N > 1) {
    if (count < N) return with_count<N - 1>(count, body);
  }
  body(Count<N>{});
}

template <class Q>
inline void small_linear(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  const int64_t bytes = blocks_of(a.k) * Q::kBytes;
  const int64_t passes = (a.m + S::kGemvRows - 1) / S::kGemvRows;
  for (int64_t panel = panel_begin; panel < panel_end; panel++) {
    const uint8_t* w = static_cast<const uint8_t*>(a.w) + panel * bytes;
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t row = a.m * pass / passes, rows = a.m * (pass + 1) / passes - row;
      with_count<S::kGemvRows>(rows, [&](auto R) __attribute__((always_inline)) {
        panel_rows<Q, decltype(R)::value>(a, w, row, a.y + (panel - panel_begin) * kLanes, a.n - panel * kLanes);
      });
    }
  }
}

// Prefill: kTilePanels panels x kTileBlocks blocks are unpacked into L1 once, then meet all rows. Between the parts of
// K the accumulators rest in y, which does not change their bits.
constexpr int64_t kTileBlocks = 24;

template <class Q, int R, int P>
inline void tile_rows(const LinearArgs& a, const uint8_t* tile, int64_t tile_blocks, int64_t first_block, int64_t row,
                      float* y, int64_t lanes) {
  const int64_t blocks = blocks_of(a.k);
  F acc[R][P];
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<P>([&](auto p) __attribute__((always_inline)) {
      acc[r][p] = first_block ? load_tail(y + (row + r) * a.ldy + 16 * p, lanes - 16 * p) : f16(0.0f);
    });
  });
  const int8_t* xq = a.xq + (row * blocks + first_block) * kBlock;
  const XBlock* xb = a.xb + row * blocks + first_block;
  for (int64_t g = 0; g < tile_blocks; g++) {
    TileBlock<Q> block[P];
    each<P>([&](auto p) __attribute__((always_inline)) { block[p].p = tile + (p * kTileBlocks + g) * kTileBlock; });
    add_block<Q, R, P>(block, xq + g * kBlock, xb + g, blocks * kBlock, blocks, acc);
  }
  each<R>([&](auto r) __attribute__((always_inline)) {
    each<P>([&](auto p) __attribute__((always_inline)) {
      store_tail(y + (row + r) * a.ldy + 16 * p, acc[r][p], lanes - 16 * p);
    });
  });
}

template <class Q>
inline void unpack_block(const uint8_t* packed, uint8_t* tile) {
  const PackedBlock<Q> block = {packed};
  S::store_w(tile + 0, block.template weights<0>());
  S::store_w(tile + 64, block.template weights<1>());
  S::store_w(tile + 128, block.template weights<2>());
  S::store_w(tile + 192, block.template weights<3>());
  S::store_w(tile + 256, block.template weights<4>());
  S::store_w(tile + 320, block.template weights<5>());
  S::store_w(tile + 384, block.template weights<6>());
  S::store_w(tile + 448, block.template weights<7>());
  S::store(reinterpret_cast<float*>(tile + 512), block.scale());
  if constexpr (Q::kMinimum || Q::kHalves) S::store(reinterpret_cast<float*>(tile + 576), block.second());
}

template <class Q, int P>
inline void tiled_panels(const LinearArgs& a, int64_t panel, float* y) {
  alignas(64) uint8_t tile[P * kTileBlocks * kTileBlock];
  const int64_t blocks = blocks_of(a.k), parts = (blocks + kTileBlocks - 1) / kTileBlocks;
  const int64_t passes = (a.m + S::kTileRows - 1) / S::kTileRows;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t first = blocks * part / parts, count = blocks * (part + 1) / parts - first;
    for (int p = 0; p < P; p++)
      for (int64_t g = 0; g < count; g++)
        unpack_block<Q>(static_cast<const uint8_t*>(a.w) + ((panel + p) * blocks + first + g) * Q::kBytes,
                        tile + (p * kTileBlocks + g) * kTileBlock);
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t row = a.m * pass / passes, rows = a.m * (pass + 1) / passes - row;
      with_count<S::kTileRows>(rows, [&](auto R) __attribute__((always_inline)) {
        tile_rows<Q, decltype(R)::value, P>(a, tile, count, first, row, y, a.n - panel * kLanes);
      });
    }
  }
}

template <class Q>
inline void linear(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  if (a.m <= S::kFewRows) return small_linear<Q>(a, panel_begin, panel_end);
  int64_t panel = panel_begin;
  for (; panel + S::kTilePanels <= panel_end; panel += S::kTilePanels)
    tiled_panels<Q, S::kTilePanels>(a, panel, a.y + (panel - panel_begin) * kLanes);
  for (; panel < panel_end; panel++) tiled_panels<Q, 1>(a, panel, a.y + (panel - panel_begin) * kLanes);
}

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

#include "simd_attention.inl"
#include "simd_rows.inl"

// Everything above in one table.
inline Kernels simd_table(Kernels k, const char* isa) {
  k.isa = isa;
  k.quantize = quantize;
  k.linear[int(WeightType::q4a)] = linear<Q4a>;
  k.linear[int(WeightType::q4)] = linear<Q4>;
  k.linear[int(WeightType::q8)] = linear<Q8>;
  k.linear[int(WeightType::q8x16)] = linear<Q8x16>;
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
