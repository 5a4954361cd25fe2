// The kernels: one table of function pointers an ISA, all with the same contracts and the same bits.
//
// Laws that every table obeys (finite inputs):
//  - integer dots are exact; float sums run in the order written at each kernel; fma only where a formula says fma;
//  - a row's result depends on neither the number of rows, nor the range of a call, nor the number of threads;
//  - NaN and infinity in an input give NaN or infinity in that row's output (their payload and sign are not specified).
// "Sum over 16 lanes": s[l] sums the elements l, l + 16, l + 32, ... ascending, then s[l] += s[l + 8], 4, 2, 1.
// Nothing is checked here: callers pass what the comments ask for. No std:: in this file or in a kernel file.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace edgeformer {

static constexpr int64_t kLanes = 16;     // rows of a weight panel, tokens of a key tile
static constexpr int64_t kBlock = 32;     // columns that share one activation scale
static constexpr int64_t kSmallRows = 8;  // up to so many rows of activations a linear costs nearly what one row costs
static constexpr int64_t kChunkTokens =
    128;  // tokens of one KV chunk: the unit of growth and of the split of a sequence
static constexpr int64_t kMaxHeadDim = 512;  // head_dim and value_dim of attention
static constexpr float kLog2E = 1.44269504f;
static constexpr int64_t kPartialHead = 16;  // floats before the output in a row of attention partials

static constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static constexpr int64_t panels_of(int64_t n) { return (n + kLanes - 1) / kLanes; }
static constexpr int64_t blocks_of(int64_t k) { return (k + kBlock - 1) / kBlock; }

// ---- weights ------------------------------------------------------------------------------------------------------
// Packed W[N, K]: panels of 16 rows, one after another; in a panel the 32-column blocks, one after another; in a block
//   q4a   16 fp16 scales, 16 fp16 minima, 256 bytes of nibbles   w = s * q + m, q in 0..15                  320 bytes
//   q4    16 fp16 scales, 256 bytes of nibbles (q + 8)           w = s * q,     q in -8..7                  288 bytes
//   q4x64   16 fp16 scales, 2 x 256 bytes: a wide block of 64 columns, K is a multiple of it                 544 bytes
//   q8    16 fp16 scales, 512 bytes (q + 128)                    w = s * q,     q in -127..127              544 bytes
//   q8x16 2 x 16 fp16 scales (columns 0..15, 16..31), 512 bytes  the same with a scale for each 16 columns  576 bytes
//   q8x128  16 fp16 scales, 32 bytes unused, 4 x 512 bytes: a wide block of 128 columns, K is a multiple of it
//                                                                                                           2112 bytes
//   f32   32 columns of 16 floats: simply column after column, K not padded
// 64 bytes hold 4 consecutive columns of 16 rows (a dword a row). Nibbles: low = columns 0..15, high = columns 16..31.
enum class WeightType : int32_t { q4a, q4, q4x64, q8, q8x16, q8x128, f32 };
static constexpr int kWeightTypes = 7;
static constexpr const char* kWeightTypeNames[kWeightTypes] = {"q4a", "q4", "q4x64", "q8", "q8x16", "q8x128", "f32"};
static constexpr bool has_nibbles(WeightType type) { return type <= WeightType::q4x64; }
// Columns that share an activation scale; K is a multiple of it if it is more than kBlock.
static constexpr int64_t span_of(WeightType type) {
  return type == WeightType::q4x64 ? 64 : type == WeightType::q8x128 ? 128 : kBlock;
}

// One 32-column block of one activation row; of those of a wide block, each has the scale of all.
struct XBlock {
  float scale;          // absmax / 127
  float scaled_sum;     // scale * float(sum of q)
  int32_t offset;       // -128 * sum of q: undoes the + 128 of q8 (and, / 16, the + 8 of q4)
  int32_t offset_part;  // -128 * sum of q over columns 0..15, for q8x16; in a wide block over all its columns
};

struct LinearArgs {
  const void* w;     // packed W[n, k], 64-byte aligned
  int64_t n, k;      // rows and columns of W, not padded
  const int8_t* xq;  // [m, blocks_of(k) * 32], from `quantize`, with the span of the weights; not for f32
  const XBlock* xb;  // [m, blocks_of(k)]
  const float* x;    // f32 weights only: [m, ldx]
  int64_t ldx;
  int64_t m;  // >= 1
  float* y;   // [m, ldy]; points at column 16 * panel_begin of row 0: a whole matrix or a tile in L1
  int64_t ldy;
  int64_t prefetch;  // x86: so many bytes ahead few rows ask for their weights; 0: the CPU sees by itself what comes
};
// y[i, r] = sum over blocks g ascending, acc starts at 0:
//   acc = fma(float(sum_c xq[i,c] * q[r,c]), xs[i,g] * ws[r,g], acc)    q8x16: twice, low columns first; q4x64 and
//                                                                       q8x128: g and c over wide blocks
//   q4a then: acc = fma(scaled_sum[i,g], m[r,g], acc)
// f32: acc = fma(x[i,c], w[r,c], acc), c ascending.
// Writes the rows [16 * panel_begin, min(n, 16 * panel_end)) of W, nothing beyond them.
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
  float* y;  // [m, ldy], a tile of `columns` columns, changed in place
  int64_t ldy, m, columns;
  const float* bias;  // [columns] or null
  Unary activation;
  float scale;            // 1 for none
  const float* residual;  // [m, ldr], same columns, or null; may be `y`'s own destination
  int64_t ldr;
};

struct GatedArgs {
  const float* y;  // [m, ldy]: panels of 16 columns, gate, up, gate, up, ...
  int64_t ldy, m;
  int64_t columns;    // of the output; a multiple of 16 but for the last tile of a row
  const float* bias;  // as `y`'s columns: [2 * round_up(columns, 16)], or null
  Unary activation;
  float* out;  // [m, ldo]; may be `y` itself with ldo == ldy
  int64_t ldo;
};

// ---- KV cache -----------------------------------------------------------------------------------------------------
enum class KvType : int32_t { int8, float32 };

// One layer's cache: chunks of kChunkTokens tokens. A chunk is, for each KV head, one after another:
//   int8     K tiles  [tokens / 16][ceil(D / 4)][16 tokens][4] bytes (q + 128), then kChunkTokens key scales (f32),
//            V pairs  [tokens / 2][round_up(Dv, 16)][2 tokens] bytes (q), then kChunkTokens value scales (f32)
//   float32  K tiles  [tokens / 16][D][16 tokens] floats, V rows [tokens][round_up(Dv, 16)] floats
// One scale a token and head: absmax / 127.
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

// Two calls may run at once if no token of the one shares a pair of values with a token of the other.
struct KvAppendArgs {
  KvLayout layout;
  uint8_t* const* chunks;        // enough of them for position + tokens
  int64_t position, tokens;      // first new token's index in the cache
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
  const float* q;  // [tokens, ldq], query head h (= kv_head * group + g) at column h * head_dim
  int64_t ldq;
  const int32_t* begin;  // [tokens]: query token i sees the keys [begin[i], end[i]); an empty range gives zeros
  const int32_t* end;
  float scale;        // of q . k
  float softcap;      // 0 for none
  const float* mask;  // added to the scores, or null: mask[i * mask_token + h * mask_head + key]; -inf hides a key
  int64_t mask_token, mask_head;
  float* out;  // [tokens, ldo], query head h at column h * value_dim (not written by attention_partial)
  int64_t ldo;
};
// For a query row and one chunk of kChunkTokens keys (chunk c holds the keys c * kChunkTokens ...), with scores in
// powers of two (L = log2(e); softmax is the same in any base):
//   int8:    q is quantized a row (token, head) as `quantize` does, one scale over head_dim;
//            s[t] = float(sum_d q[d] * k[t,d]) * (qs * ks[t]),  qs = absmax / 127 * (scale * L)
//   float32: s[t] = (fma over d ascending of q[d] * k[t,d]) * (scale * L)
//   with a softcap or a mask, `scale` instead of scale * L above, and then
//            s = softcap * tanh(s / softcap);  s += mask;  s *= L
//   max = max s[t];  p[t] = 2^(s[t] - max), 0 for a hidden key;  sum = p over 16 lanes
//   float32: out[d] = fma(p[t], v[t,d], out[d]), t ascending
//   int8:    w[t] = p[t] * vs[t] (0 where p[t] is), in 15 bits: qw[t] = round_to_even(w[t] * (32767 / max w)),
//            out[d] = float(sum_t qw[t] * v[t,d]) * (max w / 32767); max w < 2^-100 gives zeros. The sum is an exact
//            int32: 256 * 32767 * 127 < 2^31
// Chunks are merged in order, beginning with max_a = -inf and zeros:
//   M = max(max_a, max_b), a = 2^(max_a - M), b = 2^(max_b - M),
//   sum = fma(sum_b, b, sum_a * a), out = fma(out_b, b, out_a * a); a chunk without a visible key is left out.
// Result: out * (1 / sum).
//
// A row of partials: [max, sum, 14 unused, out[round_up(value_dim, 16)]].
static constexpr int64_t partial_floats(const KvLayout& l) { return kPartialHead + l.value_stride(); }

// ---- the table ----------------------------------------------------------------------------------------------------
struct Kernels {
  const char* isa;
  int64_t prefetch[2];  // what suits this CPU: of one or two rows, of more
  int64_t prefetch_for(int64_t rows) const { return prefetch[rows > 2]; }  // for LinearArgs

  // q[i,c] = round_to_even(x[i,c] * (127 / absmax)), blocks of 32 columns; a block whose absmax < 2^-100 gives scale 0.
  // Blocks [block_begin, block_end) of m rows; x[m, ldx] with k columns (the last block is padded with zeros);
  // xq[m, blocks_of(k) * 32], xb[m, blocks_of(k)]. span 64 or 128 instead of 32: absmax is that of so many columns; k
  // is a multiple of it, and block_begin and block_end of its blocks.
  void (*quantize)(const float* x, int64_t ldx, int64_t m, int64_t k, int64_t span, int64_t block_begin,
                   int64_t block_end, int8_t* xq, XBlock* xb);

  LinearFn linear[kWeightTypes];

  void (*epilogue)(const EpilogueArgs&);                      // y = activation(y + bias) * scale + residual
  void (*gated)(const GatedArgs&);                            // out = activation(gate + bias) * (up + bias)
  void (*unary)(Unary, const float* x, float* y, int64_t n);  // in place allowed

  // y[i] = (x[i] * r) * weight, r = 1 / sqrt(sum(x^2) / n + eps), the sum by fma over 16 lanes; weight may be null.
  void (*rms_norm)(const float* x, int64_t ldx, int64_t m, int64_t n, const float* weight, float eps, float* y,
                   int64_t ldy);
  // mean = sum(x) / n; r = 1 / sqrt(sum((x - mean)^2) / n + eps); y = fma((x - mean) * r, weight, bias); each may be
  // null (null weight: 1, null bias: 0).
  void (*layer_norm)(const float* x, int64_t ldx, int64_t m, int64_t n, const float* weight, const float* bias,
                     float eps, float* y, int64_t ldy);
  // y[i] = exp(x[i] - max) / sum, a row of n; -inf gives 0, a row of -inf only gives zeros. In place allowed.
  void (*softmax)(const float* x, int64_t ldx, int64_t m, int64_t n, float* y, int64_t ldy);

  // Rotates the first `rotary` (even) of each head's head_dim columns, the rest is copied. x, y: [m, ldx], head h at
  // column h * head_dim. cos, sin: [m, ldc], rotary / 2 columns. In place allowed (y == x, ldy == ldx).
  // half:        a = x[j], b = x[j + rotary / 2];  interleaved: a = x[2j], b = x[2j + 1]
  //              a' = a * cos[j] - b * sin[j], b' = b * cos[j] + a * sin[j]   (no fma)
  void (*rope)(const float* x, int64_t ldx, int64_t m, int64_t heads, int64_t head_dim, int64_t rotary,
               bool interleaved, const float* cos, const float* sin, int64_t ldc, float* y, int64_t ldy);

  // y[c] = float(q[c]) * s[c / block]: one embedding row. block divides nothing in particular; the last may be short.
  void (*dequantize)(const int8_t* q, const float* s, int64_t k, int64_t block, float* y);

  void (*kv_append)(const KvAppendArgs&);
  // All chunks for the query tokens [token_begin, token_end) of one KV head: the prefill form (and short decodes).
  void (*attention)(const AttentionArgs&, int64_t kv_head, int64_t token_begin, int64_t token_end);
  // One chunk: partial[(token_end - token_begin) * group, partial_floats], row = (token - token_begin) * group + g.
  void (*attention_partial)(const AttentionArgs&, int64_t kv_head, int64_t token_begin, int64_t token_end,
                            int64_t chunk, float* partial);
  // Merges chunks [0, chunks) in order, chunk c's partials at partial + c * stride, and writes `out` of these rows:
  // the same bits as `attention`. A chunk outside every row's [begin, end) may have been skipped only if its partials
  // were given max = -inf, sum = 0.
  void (*attention_merge)(const AttentionArgs&, int64_t kv_head, int64_t token_begin, int64_t token_end, int64_t chunks,
                          const float* partial, int64_t stride);
};

// Each table starts as a copy of the next-lower one and overrides what it does better. One file, one symbol each.
Kernels kernels_scalar();
Kernels kernels_avx2(Kernels scalar);
Kernels kernels_avxvnni(Kernels avx2);
Kernels kernels_avx512vnni(Kernels avxvnni);
Kernels kernels_neon_dotprod(Kernels scalar);
Kernels kernels_neon_i8mm(Kernels neon_dotprod);

}  // namespace edgeformer
