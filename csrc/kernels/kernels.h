// The kernels: one table of function pointers for each ISA, all with the same contracts and the same bits.
//
// Every table keeps these laws, for finite inputs:
//   integer dots     are exact
//   float sums       run in the order that the kernel's formula gives
//   fma              is used where the formula says fma, nowhere else
//   rows             a row's result does not depend on the number of rows, the range of a call or the threads
//   NaN, infinity    in an input give NaN or infinity in that row's output; payload and sign are unspecified
//
// "Sum over 16 lanes": s[l] sums the elements l, l + 16, l + 32, ... ascending, l = 0 .. 15; then s[l] += s[l + 8],
// s[l] += s[l + 4], s[l] += s[l + 2], s[0] += s[1].
// "fma over c ascending": acc = 0; for each c: acc = fma(a, b, acc), rounded once.
// x[m, ldx]: m rows, ldx elements from one row to the next. All sizes are in elements unless they say bytes.
//
// A kernel checks nothing: its callers do. No std:: in this file or in a kernel's file (tests/csrc holds it).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace edgeformer {

static constexpr int64_t kLanes = 16;         // rows of a weight panel, tokens of a key tile
static constexpr int64_t kBlock = 32;         // columns that share one activation scale
static constexpr int64_t kSmallRows = 8;      // so few rows of activations cost a linear nearly what one row costs
static constexpr int64_t kFewRows = 64;       // so few rows read nibbles as packed (x86): a tile would cost more
static constexpr int64_t kChunkTokens = 128;  // tokens of a KV chunk: the unit of growth and of a sequence's split
static constexpr int64_t kMaxHeadDim = 512;   // the largest head_dim and value_dim of attention
static constexpr int64_t kPartialHead = 16;   // floats before the output in a row of attention partials
static constexpr float kLog2E = 1.44269504f;
static constexpr int64_t kSumBlock = 256;  // scores of a vocabulary whose exponentials make one sum
static constexpr float kLowest = -1e4f;    // a score so far below the largest counts as so far: exp gives 0

// Asks for the cache lines of a range; for_write: 1 where they will be written. What is read comes into L2 alone: L1 has
// few lines under way at once, and a core that asks for more of them waits.
template <int for_write>
static inline void prefetch_bytes(const void* from, int64_t bytes) {
  constexpr int level = for_write ? 3 : 2;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(from) + i, for_write, level);
}
static constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static constexpr int64_t panels_of(int64_t n) { return (n + kLanes - 1) / kLanes; }
static constexpr int64_t blocks_of(int64_t k) { return (k + kBlock - 1) / kBlock; }

// ---- weights ------------------------------------------------------------------------------------------------------
// Packed W[N, K]: panels of 16 rows, one after another; in a panel its blocks of columns, one after another. A block:
//
//   type    columns  fp16 values before the weights          weights, bytes            weight              bytes
//   q4a          32  16 scales, 16 minima                    256 of nibbles            s * q + m,  0 .. 15      320
//   q4           32  16 scales                               256 of nibbles (q + 8)    s * q,     -8 .. 7       288
//   q4x64        64  16 scales                               2 x 256 (q + 8)           s * q,     -8 .. 7       544
//   q8           32  16 scales                               512                       s * q,   -127 .. 127     544
//   q8x16        32  16 scales of columns 0 .. 15, 16 of     512                       s * q,   -127 .. 127     576
//                    columns 16 .. 31
//   q8x128      128  16 scales, 16 unused                    4 x 512                   s * q,   -127 .. 127    2112
//   f32           1  none                                    16 floats                                           64
//
// 64 bytes of weights are 4 consecutive columns of 16 rows, 4 bytes a row. A byte of nibbles has column c (0 .. 15) of
// its 32 in the low half and column c + 16 in the high half. N is padded to 16 rows with zeros, K to 32 columns. q4x64
// and q8x128 have wide blocks: K is a multiple of 64, of 128. f32: K is not padded. A byte of q8, q8x16 and q8x128 is
// q ^ kByteFlip: what the dot products of this architecture take.
enum class WeightType : int32_t { q4a, q4, q4x64, q8, q8x16, q8x128, f32 };
#if defined(__aarch64__)
static constexpr uint8_t kByteFlip = 0;  // q: SDOT and SMMLA multiply signed bytes
#else
static constexpr uint8_t kByteFlip = 0x80;  // q + 128: VPDPBUSD multiplies unsigned bytes with signed ones
#endif
static constexpr int32_t byte_weight(uint8_t packed) { return int8_t(packed ^ kByteFlip); }
static constexpr int kWeightTypes = 7;
static constexpr const char* kWeightTypeNames[kWeightTypes] = {"q4a", "q4", "q4x64", "q8", "q8x16", "q8x128", "f32"};
static constexpr bool has_nibbles(WeightType type) { return type <= WeightType::q4x64; }
// Columns that share an activation scale. If they are more than kBlock, K is a multiple of them.
static constexpr int64_t span_of(WeightType type) {
  return type == WeightType::q4x64 ? 64 : type == WeightType::q8x128 ? 128 : kBlock;
}

// 32 columns of one row of quantized activations, q in -127 .. 127. Blocks of one span of 64 or 128 columns have the
// same `scale` and the same `offset_part`.
struct XBlock {
  float scale;          // absmax / 127
  float scaled_sum;     // scale * float(sum of q)
  int32_t offset;       // -128 * sum of q: undoes + 128 of q8's bytes; / 16 it undoes + 8 of q4
  int32_t offset_part;  // -128 * sum of q over columns 0 .. 15 (for q8x16); span > 32: over all columns of the span
};

struct QuantizeArgs {
  const float* x;  // [m, ldx], k columns
  int64_t ldx, m, k;
  int64_t span;                    // columns that share a scale: 32, 64 or 128, as span_of(type)
  int64_t block_begin, block_end;  // blocks of kBlock columns to write; span > 32: whole spans, k is a multiple of span
  int8_t* xq;                      // [m, blocks_of(k) * 32]
  XBlock* xb;                      // [m, blocks_of(k)]
};
// The blocks [block_begin, block_end) of each row; columns from k on are zeros.
//
//   absmax = max |x[i, c]| over the span of c;  scale = absmax / 127
//   q[i, c] = round_to_even(x[i, c] * (127 / absmax));  absmax < 2^-100: q = 0, scale = 0

struct LinearArgs {
  const void* w;     // packed W[n, k], 64-byte aligned
  int64_t n, k;      // rows and columns of W, without padding
  const int8_t* xq;  // [m, blocks_of(k) * 32], from `quantize` with span_of(type); f32: unused
  const XBlock* xb;  // [m, blocks_of(k)]
  const float* x;    // [m, ldx], for f32 weights only
  int64_t ldx;
  int64_t m;  // >= 1
  float* y;   // [m, ldy], from column 16 * panel_begin on: a whole matrix or a tile in L1
  int64_t ldy;
  // x86: how far ahead one pass over one panel prefetches, in bytes. Several passes, and those over several panels,
  // prefetch the next panels. 0 leaves it to the CPU's own prefetcher.
  int64_t prefetch;
};
// y[i, r] = acc, for W's rows r in [16 * panel_begin, min(n, 16 * panel_end)); writes no others. acc = 0, then
//
//   q4, q8          for each block g ascending:
//                     acc = fma(float(sum over c of xq[i, c] * q[r, c]), xs[i, g] * ws[r, g], acc)
//   q4x64, q8x128   the same, g over blocks of 64 or 128 columns
//   q8x16           the same twice a block: columns 0 .. 15, then 16 .. 31, each half with its own ws
//   q4a             the same as q4, and after each block: acc = fma(scaled_sum[i, g], m[r, g], acc)
//   f32             acc = fma(x[i, c], w[r, c], acc), c ascending
//
// xs: the blocks' XBlock::scale; ws, m: W's scales and minima as floats.
using LinearFn = void (*)(const LinearArgs&, int64_t panel_begin, int64_t panel_end);

// ---- elementwise --------------------------------------------------------------------------------------------------
enum class Unary : int32_t {
  identity,
  exp,
  sigmoid,
  tanh,
  erf,
  sqrt,
  sin,
  cos,
  log,
  softplus,
  relu,
  relu2,
  silu,
  gelu,
  gelu_tanh,
  quick_gelu,
  neg,
  abs,
  reciprocal,
  rsqrt,
  count,
};

struct EpilogueArgs {
  float* y;  // [m, ldy], `columns` of each row, changed in place
  int64_t ldy, m, columns;
  const float* bias;  // [columns] or null
  Unary activation;
  float scale;            // 1 for none
  const float* residual;  // [m, ldr] or null; may be what `y` is later copied to
  int64_t ldr;
};

struct GatedArgs {
  const float* y;  // [m, ldy]: panels of 16 columns: gate, up, gate, up, ...
  int64_t ldy, m;
  int64_t columns;    // of the output; a multiple of 16 except in the last tile of a row
  const float* bias;  // [2 * round_up(columns, 16)] in the order of `y`, or null
  Unary activation;
  float* out;  // [m, ldo]; in place: `y` itself with ldo == ldy
  int64_t ldo;
};

// ---- rows ---------------------------------------------------------------------------------------------------------
struct NormArgs {
  const float* x;  // [m, ldx], n columns
  int64_t ldx, m, n;
  const float* weight;  // [n] or null for 1: rms_norm then multiplies by none
  const float* bias;    // [n] or null for 0: of layer_norm; rms_norm has none
  float eps;
  float* y;  // [m, ldy]
  int64_t ldy;
};
// Sums run over 16 lanes.
//
//   rms_norm     r = 1 / sqrt(sum(x^2) / n + eps), the sum by fma;  y = (x * r) * weight
//   layer_norm   mean = sum(x) / n;  r = 1 / sqrt(sum((x - mean)^2) / n + eps), the second sum by fma
//                y = fma((x - mean) * r, weight, bias)

struct RopeArgs {
  const float* x;  // [m, ldx], head h at column h * head_dim
  int64_t ldx, m;
  int64_t heads, head_dim;
  int64_t rotary;  // columns of each head to rotate, even; the others are copied
  bool interleaved;
  const float* cos;  // [m, ldc], rotary / 2 columns
  const float* sin;
  int64_t ldc;
  float* y;  // [m, ldy], as x; in place: `x` itself with ldy == ldx
  int64_t ldy;
};
//   interleaved       a = x[2 j], b = x[2 j + 1]
//   not interleaved   a = x[j],   b = x[j + rotary / 2]
//   both              a' = a * cos[j] - b * sin[j];  b' = b * cos[j] + a * sin[j]   without fma

// ---- KV cache -----------------------------------------------------------------------------------------------------
enum class KvType : int32_t { int8, float32 };

// One layer's cache: chunks of kChunkTokens tokens. A chunk has, for each KV head one after another (D: head_dim,
// Dv: value_dim, T = kChunkTokens):
//
//   int8      K    [T / 16][ceil(D / 4)][16 tokens][4 columns]    bytes q + 128
//             Ks   [T]                                            floats: key scales
//             V    [T / 2][round_up(Dv, 16)][2 tokens]            bytes q
//             Vs   [T]                                            floats: value scales
//   float32   K    [T / 16][D][16 tokens]                         floats
//             V    [T][round_up(Dv, 16)]                          floats
//
// int8: one scale for each token and head, absmax / 127; q in -127 .. 127.
struct KvLayout {
  KvType type;
  int64_t kv_heads, head_dim, value_dim;

  constexpr int64_t key_bytes() const {
    return type == KvType::int8 ? kChunkTokens * round_up(head_dim, 4) : kChunkTokens * head_dim * 4;
  }
  constexpr int64_t value_stride() const { return round_up(value_dim, kLanes); }  // elements
  constexpr int64_t scale_bytes() const { return type == KvType::int8 ? kChunkTokens * 4 : 0; }
  constexpr int64_t value_bytes() const { return kChunkTokens * value_stride() * (type == KvType::int8 ? 1 : 4); }
  constexpr int64_t key_scales() const { return key_bytes(); }  // byte offsets inside a head's part
  constexpr int64_t values() const { return key_bytes() + scale_bytes(); }
  constexpr int64_t value_scales() const { return values() + value_bytes(); }
  constexpr int64_t head_bytes() const { return round_up(value_scales() + scale_bytes(), 64); }
  constexpr int64_t chunk_bytes() const { return kv_heads * head_bytes(); }
};

// Writes `tokens` new tokens into the chunks. Two calls may run at once if no token of the one is in the same pair of
// tokens (2 j, 2 j + 1) as a token of the other: int8 values of a pair are interleaved, and a store rewrites both.
struct KvAppendArgs {
  KvLayout layout;
  uint8_t* const* chunks;        // enough for position + tokens
  int64_t position, tokens;      // index of the first new token, number of new tokens
  int64_t head_begin, head_end;  // KV heads to write
  const float* k;                // [tokens, ldk], head h at column h * head_dim
  int64_t ldk;
  const float* v;  // [tokens, ldv], head h at column h * value_dim
  int64_t ldv;
};

struct AttentionArgs {
  KvLayout layout;
  const uint8_t* const* chunks;
  int64_t group;   // query heads of one KV head
  int64_t tokens;  // query tokens
  const float* q;  // [tokens, ldq], query head h = kv_head * group + g at column h * head_dim
  int64_t ldq;
  const int32_t* begin;  // [tokens]: query token i sees the keys [begin[i], end[i]); an empty range gives zeros
  const int32_t* end;
  float scale;        // of q . k
  float softcap;      // 0 for none
  const float* mask;  // added to the scores, or null; -inf hides a key. [token, head, key] with the strides below
  int64_t mask_token, mask_head;  // element (i, h, key) is mask[i * mask_token + h * mask_head + key]
  float* out;  // [tokens, ldo], query head h at column h * value_dim; attention_partial does not write it
  int64_t ldo;
  const uint8_t* ahead;  // what this thread most likely reads next: a chunk of keys. Asked for with few rows; or null
};
// The formula, for a query row (token, head) and chunk c, which has the keys [128 c, 128 c + 128). Scores are powers of
// two (L = log2(e)): the softmax is the same in any base.
//
//   scores       int8      qs, q8 = the row of q quantized as by `quantize`, with one scale over head_dim
//                          s[t] = float(sum over d of q8[d] * k[t, d]) * ((qs * S) * ks[t])
//                float32   s[t] = (fma over d ascending of q[d] * k[t, d]) * S
//                S = scale * L, or with a softcap or a mask S = scale, and then
//                          s = softcap * tanh(s / softcap);  s += mask;  s *= L
//   weights      max = max of s[t];  p[t] = 2^(s[t] - max), 0 for a hidden key;  sum = sum of p over 16 lanes
//   output       float32   out[d] = fma over t ascending of p[t] * v[t, d]
//                int8      w[t] = p[t] * vs[t], 0 where p[t] is 0;  W = max of w[t]
//                          qw[t] = round_to_even(w[t] * (32767 / W))
//                          out[d] = float(sum over t of qw[t] * v[t, d]) * (W / 32767);  W < 2^-100 gives zeros
//                          The sum is an exact int32: 128 * 32767 * 127 < 2^31.
//   merge        from max_a = -inf, sum_a = 0, out_a = 0, chunks b ascending, without those that have no visible key:
//                          M = max(max_a, max_b), a = 2^(max_a - M), b = 2^(max_b - M)
//                          sum = fma(sum_b, b, sum_a * a);  out = fma(out_b, b, out_a * a)
//   result       out * (1 / sum)
//
// A row of partials, one chunk's: [max, sum, 14 unused, out[round_up(value_dim, 16)]].
static constexpr int64_t partial_floats(const KvLayout& l) { return kPartialHead + l.value_stride(); }

// What attention_partial wrote for the chunks [0, chunks) of a sequence. A chunk that no row sees may be left out by
// rows with max = -inf, sum = 0.
struct MergeArgs {
  const float* partial;  // [chunks, stride], each chunk's rows [(token_end - token_begin) * group, partial_floats]
  int64_t chunks, stride;
};

// ---- the table ----------------------------------------------------------------------------------------------------
struct Kernels {
  const char* isa;
  int64_t prefetch[2];  // LinearArgs::prefetch that suits this CPU: for 1 or 2 rows, for more
  int64_t prefetch_for(int64_t rows) const { return prefetch[rows > 2]; }

  void (*quantize)(const QuantizeArgs&);
  LinearFn linear[kWeightTypes];

  // y = activation(y + bias) * scale + residual
  void (*epilogue)(const EpilogueArgs&);
  // out = activation(gate + bias) * (up + bias)
  void (*gated)(const GatedArgs&);
  // y[i] = f(x[i]), n values; in place allowed. Formulas and errors: scalar/scalar_math.h
  void (*unary)(Unary, const float* x, float* y, int64_t n);

  void (*rms_norm)(const NormArgs&);
  void (*layer_norm)(const NormArgs&);
  // x[m, ldx] with n columns -> y[m, ldy]; in place allowed. The sum runs over 16 lanes.
  //   e = exp(x - max);  y = e / sum(e);  -inf gives 0, a row of -inf only gives zeros
  void (*softmax)(const float* x, int64_t ldx, int64_t m, int64_t n, float* y, int64_t ldy);
  void (*rope)(const RopeArgs&);

  // Of scores x[n] of which none is above `top`; -inf is allowed, NaN makes its sums NaN:
  //   d[i] = max(x[i] - top, kLowest);  sums[b] = sum of exp(d) over block b;  returns the sum of exp(d) * d over all
  // The sums of a block run over 16 lanes in float32: a sum of exponentials is off by at most 19 * 2^-24 of itself (15
  // additions in a lane, 4 of lanes). Those of products are added in float64.
  double (*exponential_sums)(const float* x, int64_t n, float top, double* sums);
  // The i with x[i] >= bound, ascending, into places[n]; returns how many.
  int64_t (*places_reaching)(const float* x, int64_t n, float bound, int64_t* places);
  // The place of the largest of x[n], n >= 1: the first of equal ones, and the first NaN where there is one.
  int64_t (*place_of_largest)(const float* x, int64_t n);

  void (*kv_append)(const KvAppendArgs&);
  // Attention of the query tokens [token_begin, token_end) and the query heads of one KV head.
  //   attention           over all chunks, into `out`: prefill, and decoding with a short cache
  //   attention_partial   over one chunk: row (token - token_begin) * group + g of partial[, partial_floats]
  //   attention_merge     merges the partials of all chunks into `out`: the same bits as `attention`
  void (*attention)(const AttentionArgs&, int64_t kv_head, int64_t token_begin, int64_t token_end);
  void (*attention_partial)(const AttentionArgs&, int64_t kv_head, int64_t token_begin, int64_t token_end,
                            int64_t chunk, float* partial);
  void (*attention_merge)(const AttentionArgs&, int64_t kv_head, int64_t token_begin, int64_t token_end,
                          const MergeArgs&);
};

// The one list of kernels beside `linear`. Every table sets all of them and linear[0 .. kWeightTypes), each from its own
// file or two; only neon_i8mm inherits, all but the linears of quantized weights, from neon_dotprod. kernels_for in
// engine/dispatch.h refuses a table with a null pointer.
// clang-format off
#define EDGEFORMER_KERNELS(X) \
  X(quantize)          \
  X(epilogue)          \
  X(gated)             \
  X(unary)             \
  X(rms_norm)          \
  X(layer_norm)        \
  X(softmax)           \
  X(rope)              \
  X(exponential_sums)  \
  X(places_reaching)   \
  X(place_of_largest)  \
  X(kv_append)         \
  X(attention)         \
  X(attention_partial) \
  X(attention_merge)
// clang-format on

#define EDGEFORMER_COUNT(name) +1
static_assert(sizeof(Kernels) == sizeof(Kernels::isa) + sizeof(Kernels::prefetch) + sizeof(Kernels::linear) +
                                     (EDGEFORMER_KERNELS(EDGEFORMER_COUNT)) * sizeof(void (*)()),
              "a kernel is missing in EDGEFORMER_KERNELS");
#undef EDGEFORMER_COUNT

// One file, one symbol each. A function that takes a table returns it with more kernels set.
Kernels kernels_scalar();
Kernels kernels_avx2();
Kernels kernels_avxvnni();
Kernels kernels_avx512vnni();  // without the linears of q8, q8x16 and q8x128
Kernels kernels_avx512vnni_bytes(Kernels avx512vnni);
Kernels kernels_neon_dotprod();
Kernels kernels_neon_i8mm(Kernels neon_dotprod);

}  // namespace edgeformer
