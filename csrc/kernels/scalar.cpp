// The scalar table: plain loops, one element at a time, written straight from the formulas in kernels.h.
//
// It shares no code with the SIMD tables: it is the witness they are compared with, and what runs where nothing better
// does. fma is the C library's where the CPU has none; it is correctly rounded by definition, so the bits stay.
#include "kernels.h"
#include "scalar_math.h"

namespace edgeformer {
namespace {

float half_to_float(const uint8_t* p) {
  uint16_t h;
  __builtin_memcpy(&h, p, 2);
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24
    const float value = float(mantissa) * 5.9604644775390625e-08f;
    return float_of(bits_of(value) | sign);
  }
  const uint32_t e = exponent == 31 ? 255 : exponent + 112;
  return float_of(sign | e << 23 | mantissa << 13);
}

float sum16(const float* s16) {
  float s[16];
  for (int l = 0; l < 16; l++) s[l] = s16[l];
  for (int half = 8; half; half /= 2)
    for (int l = 0; l < half; l++) s[l] = s[l] + s[l + half];
  return s[0];
}

// absmax of n values by their bits (NaN counts as the largest), then scale and quantized values, in -limit..limit.
template <class T, int limit = 127>
float quantize_values(const float* x, int64_t n, T* q) {
  uint32_t top = 0;
  for (int64_t c = 0; c < n; c++) {
    const uint32_t a = bits_of(x[c]) & 0x7fffffffu;
    if (a > top) top = a;
  }
  const float absmax = float_of(top);
  if (absmax < 0x1p-100f) {
    for (int64_t c = 0; c < n; c++) q[c] = 0;
    return 0.0f;
  }
  const float inverse = float(limit) / absmax;
  for (int64_t c = 0; c < n; c++) {
    const float v = x[c] * inverse;
    // + 1.5 * 2^23 rounds to the nearest even integer; |v| <= limit * 1.000001 for finite x, and NaN gives 0.
    q[c] = v == v ? T(int32_t((v + 12582912.0f) - 12582912.0f)) : T(0);
  }
  return absmax / float(limit);
}

void quantize_wide(const float* x, int64_t ldx, int64_t m, int64_t k, int64_t span, int64_t block_begin,
                   int64_t block_end, int8_t* xq, XBlock* xb) {
  for (int64_t i = 0; i < m; i++) {
    for (int64_t c = block_begin * kBlock; c < block_end * kBlock; c += span) {
      int8_t* q = xq + i * k + c;
      const float scale = quantize_values(x + i * ldx + c, span, q);
      int32_t all = 0;
      for (int64_t j = 0; j < span; j++) all += q[j];
      for (int64_t j = 0; j < span; j += kBlock) {
        int32_t sum = 0;
        for (int64_t d = 0; d < kBlock; d++) sum += q[j + d];
        xb[(i * k + c + j) / kBlock] = {scale, scale * float(sum), -128 * sum, -128 * all};
      }
    }
  }
}

void quantize(const float* x, int64_t ldx, int64_t m, int64_t k, int64_t span, int64_t block_begin, int64_t block_end,
              int8_t* xq, XBlock* xb) {
  if (span > kBlock) return quantize_wide(x, ldx, m, k, span, block_begin, block_end, xq, xb);
  const int64_t blocks = blocks_of(k);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t g = block_begin; g < block_end; g++) {
      float values[kBlock];
      for (int64_t c = 0; c < kBlock; c++) values[c] = g * kBlock + c < k ? x[i * ldx + g * kBlock + c] : 0.0f;
      int8_t* q = xq + (i * blocks + g) * kBlock;
      XBlock& b = xb[i * blocks + g];
      b.scale = quantize_values(values, kBlock, q);
      int32_t low = 0, high = 0;
      for (int c = 0; c < 16; c++) low += q[c];
      for (int c = 16; c < 32; c++) high += q[c];
      b.scaled_sum = b.scale * float(low + high);
      b.offset = -128 * (low + high);
      b.offset_part = -128 * low;
    }
  }
}

// ---- linears: one output element at a time -----------------------------------------------------------------------

int32_t nibble(const uint8_t* block, int64_t row, int64_t c) {
  const uint8_t byte = block[(c % 16) / 4 * 64 + row * 4 + c % 4];
  return c < 16 ? byte & 15 : byte >> 4;
}

int32_t byte_weight(const uint8_t* block, int64_t row, int64_t c) {
  return int32_t(block[c / 4 * 64 + row * 4 + c % 4]) - 128;
}

template <class Element>
void for_each_output(const LinearArgs& a, int64_t panel_begin, int64_t panel_end, Element element) {
  for (int64_t r = panel_begin * kLanes; r < panel_end * kLanes && r < a.n; r++)
    for (int64_t i = 0; i < a.m; i++) a.y[i * a.ldy + r - panel_begin * kLanes] = element(r / kLanes, r % kLanes, i);
}

template <WeightType type>
void linear_blocks(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  constexpr int64_t head = type == WeightType::q4a || type == WeightType::q8x16 ? 64 : 32;
  constexpr bool nibbles = has_nibbles(type);
  constexpr int64_t bytes = head + (nibbles ? 256 : 512);
  const int64_t blocks = blocks_of(a.k);
  for_each_output(a, panel_begin, panel_end, [&](int64_t panel, int64_t row, int64_t i) {
    float acc = 0.0f;
    for (int64_t g = 0; g < blocks; g++) {
      const uint8_t* block = static_cast<const uint8_t*>(a.w) + (panel * blocks + g) * bytes;
      const XBlock& xb = a.xb[i * blocks + g];
      const int8_t* q = a.xq + (i * blocks + g) * kBlock;
      int32_t dot[2] = {0, 0};  // columns 0..15 and 16..31
      for (int c = 0; c < kBlock; c++) {
        const int32_t w = nibbles ? nibble(block + head, row, c) - (type == WeightType::q4 ? 8 : 0)
                                  : byte_weight(block + head, row, c);
        dot[c / 16] += int32_t(q[c]) * w;
      }
      const float scale = half_to_float(block + 2 * row);
      if (type == WeightType::q8x16) {
        const float high = half_to_float(block + 32 + 2 * row);
        acc = fma1(float(dot[0]), xb.scale * scale, acc);
        acc = fma1(float(dot[1]), xb.scale * high, acc);
      } else {
        acc = fma1(float(dot[0] + dot[1]), xb.scale * scale, acc);
      }
      if (type == WeightType::q4a) acc = fma1(xb.scaled_sum, half_to_float(block + 32 + 2 * row), acc);
    }
    return acc;
  });
}

template <WeightType type>
void linear_wide(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  constexpr bool nibbles = has_nibbles(type);
  constexpr int64_t span = span_of(type), head = nibbles ? 32 : 64, part = nibbles ? 256 : 512;
  constexpr int64_t bytes = head + span / kBlock * part;
  const int64_t wides = a.k / span;
  for_each_output(a, panel_begin, panel_end, [&](int64_t panel, int64_t row, int64_t i) {
    float acc = 0.0f;
    for (int64_t g = 0; g < wides; g++) {
      const uint8_t* block = static_cast<const uint8_t*>(a.w) + (panel * wides + g) * bytes;
      int32_t dot = 0;
      for (int64_t c = 0; c < span; c++) {
        const uint8_t* w = block + head + c / kBlock * part;
        dot += int32_t(a.xq[i * a.k + g * span + c]) *
               (nibbles ? nibble(w, row, c % kBlock) - 8 : byte_weight(w, row, c % kBlock));
      }
      acc = fma1(float(dot), a.xb[(i * a.k + g * span) / kBlock].scale * half_to_float(block + 2 * row), acc);
    }
    return acc;
  });
}

void linear_f32(const LinearArgs& a, int64_t panel_begin, int64_t panel_end) {
  for_each_output(a, panel_begin, panel_end, [&](int64_t panel, int64_t row, int64_t i) {
    const float* w = static_cast<const float*>(a.w) + panel * a.k * kLanes + row;
    float acc = 0.0f;
    for (int64_t c = 0; c < a.k; c++) acc = fma1(a.x[i * a.ldx + c], w[c * kLanes], acc);
    return acc;
  });
}

// ---- elementwise and rows -----------------------------------------------------------------------------------------

void epilogue(const EpilogueArgs& a) {
  for (int64_t i = 0; i < a.m; i++) {
    for (int64_t c = 0; c < a.columns; c++) {
      float v = a.y[i * a.ldy + c];
      if (a.bias) v = v + a.bias[c];
      v = unary1(a.activation, v) * a.scale;
      if (a.residual) v = v + a.residual[i * a.ldr + c];
      a.y[i * a.ldy + c] = v;
    }
  }
}

void gated(const GatedArgs& a) {
  for (int64_t i = 0; i < a.m; i++) {
    for (int64_t c = 0; c < a.columns; c++) {
      const int64_t at = c / kLanes * 2 * kLanes + c % kLanes;
      float gate = a.y[i * a.ldy + at], up = a.y[i * a.ldy + at + kLanes];
      if (a.bias) gate = gate + a.bias[at], up = up + a.bias[at + kLanes];
      a.out[i * a.ldo + c] = unary1(a.activation, gate) * up;
    }
  }
}

void unary(Unary op, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = unary1(op, x[i]);
}

void rms_norm(const float* x, int64_t ldx, int64_t m, int64_t n, const float* weight, float eps, float* y,
              int64_t ldy) {
  for (int64_t i = 0; i < m; i++) {
    const float* row = x + i * ldx;
    float s[16] = {};
    for (int64_t c = 0; c < n; c++) s[c % 16] = fma1(row[c], row[c], s[c % 16]);
    const float r = 1.0f / sqrt1(sum16(s) / float(n) + eps);
    for (int64_t c = 0; c < n; c++) {
      const float v = row[c] * r;
      y[i * ldy + c] = weight ? v * weight[c] : v;
    }
  }
}

void layer_norm(const float* x, int64_t ldx, int64_t m, int64_t n, const float* weight, const float* bias, float eps,
                float* y, int64_t ldy) {
  for (int64_t i = 0; i < m; i++) {
    const float* row = x + i * ldx;
    float s[16] = {};
    for (int64_t c = 0; c < n; c++) s[c % 16] = s[c % 16] + row[c];
    const float mean = sum16(s) / float(n);
    float v[16] = {};
    for (int64_t c = 0; c < n; c++) v[c % 16] = fma1(row[c] - mean, row[c] - mean, v[c % 16]);
    const float r = 1.0f / sqrt1(sum16(v) / float(n) + eps);
    for (int64_t c = 0; c < n; c++)
      y[i * ldy + c] = fma1((row[c] - mean) * r, weight ? weight[c] : 1.0f, bias ? bias[c] : 0.0f);
  }
}

void softmax(const float* x, int64_t ldx, int64_t m, int64_t n, float* y, int64_t ldy) {
  for (int64_t i = 0; i < m; i++) {
    float top = -__builtin_inff();
    for (int64_t c = 0; c < n; c++) top = max1(top, x[i * ldx + c]);
    if (top == -__builtin_inff()) top = 0.0f;
    float s[16] = {};
    for (int64_t c = 0; c < n; c++) {
      const float e = exp1(x[i * ldx + c] - top);
      y[i * ldy + c] = e;
      s[c % 16] = s[c % 16] + e;
    }
    const float sum = sum16(s);
    for (int64_t c = 0; c < n; c++) y[i * ldy + c] = sum == 0.0f ? 0.0f : y[i * ldy + c] / sum;
  }
}

void rope(const float* x, int64_t ldx, int64_t m, int64_t heads, int64_t head_dim, int64_t rotary, bool interleaved,
          const float* cos, const float* sin, int64_t ldc, float* y, int64_t ldy) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < m; i++) {
    for (int64_t h = 0; h < heads; h++) {
      const float* from = x + i * ldx + h * head_dim;
      float* to = y + i * ldy + h * head_dim;
      for (int64_t j = 0; j < half; j++) {
        const int64_t at_a = interleaved ? 2 * j : j, at_b = interleaved ? 2 * j + 1 : j + half;
        const float a = from[at_a], b = from[at_b], c = cos[i * ldc + j], s = sin[i * ldc + j];
        to[at_a] = a * c - b * s;
        to[at_b] = b * c + a * s;
      }
      for (int64_t j = rotary; j < head_dim; j++) to[j] = from[j];
    }
  }
}

void dequantize(const int8_t* q, const float* s, int64_t k, int64_t block, float* y) {
  for (int64_t c = 0; c < k; c++) y[c] = float(q[c]) * s[c / block];
}

// ---- attention ----------------------------------------------------------------------------------------------------

void put_float(uint8_t* p, float v) { __builtin_memcpy(p, &v, 4); }

float get_float(const uint8_t* p) {
  float v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

void kv_append(const KvAppendArgs& a) {
  const KvLayout& l = a.layout;
  for (int64_t i = 0; i < a.tokens; i++) {
    const int64_t t = (a.position + i) % kChunkTokens;
    for (int64_t h = a.head_begin; h < a.head_end; h++) {
      uint8_t* head = a.chunks[(a.position + i) / kChunkTokens] + h * l.head_bytes();
      const float* k = a.k + i * a.ldk + h * l.head_dim;
      const float* v = a.v + i * a.ldv + h * l.value_dim;
      if (l.type == KvType::float32) {
        for (int64_t d = 0; d < l.head_dim; d++) put_float(head + ((t / 16 * l.head_dim + d) * 16 + t % 16) * 4, k[d]);
        for (int64_t d = 0; d < l.value_stride(); d++)
          put_float(head + l.values() + (t * l.value_stride() + d) * 4, d < l.value_dim ? v[d] : 0.0f);
        continue;
      }
      int8_t q[kMaxHeadDim + 16] = {};
      put_float(head + l.key_scales() + t * 4, quantize_values(k, l.head_dim, q));
      const int64_t d4 = round_up(l.head_dim, 4);
      for (int64_t d = 0; d < d4; d++)
        head[t / 16 * 16 * d4 + d / 4 * 64 + t % 16 * 4 + d % 4] = uint8_t((d < l.head_dim ? q[d] : 0) + 128);
      put_float(head + l.value_scales() + t * 4, quantize_values(v, l.value_dim, q));
      for (int64_t d = 0; d < l.value_stride(); d++)
        head[l.values() + (t / 2 * l.value_stride() + d) * 2 + t % 2] = uint8_t(d < l.value_dim ? q[d] : 0);
    }
  }
}

// One query row (token i, query head h) against one chunk: partial = [max, sum, ..., out].
void attend(const AttentionArgs& a, int64_t kv_head, int64_t i, int64_t h, int64_t chunk, float* partial) {
  const KvLayout& l = a.layout;
  const float infinity = __builtin_inff();
  float* out = partial + kPartialHead;
  for (int64_t d = 0; d < l.value_stride(); d++) out[d] = 0.0f;
  partial[0] = -infinity;
  partial[1] = 0.0f;
  const int64_t first = chunk * kChunkTokens;
  int64_t begin = a.begin[i] - first, end = a.end[i] - first;
  if (begin < 0) begin = 0;
  if (end > kChunkTokens) end = kChunkTokens;
  if (begin >= end) return;

  const uint8_t* head = a.chunks[chunk] + kv_head * l.head_bytes();
  const float* q = a.q + i * a.ldq + h * l.head_dim;
  int8_t q8[kMaxHeadDim];
  float qs = 0.0f;
  const bool plain = a.softcap == 0.0f && !a.mask;
  const float scale = plain ? a.scale * kLog2E : a.scale;
  if (l.type == KvType::int8) qs = quantize_values(q, l.head_dim, q8) * scale;
  float s[kChunkTokens], p[kChunkTokens] = {};
  float top = -infinity;
  for (int64_t t = begin; t < end; t++) {
    if (l.type == KvType::int8) {
      const uint8_t* tile = head + t / 16 * 16 * round_up(l.head_dim, 4) + t % 16 * 4;
      int32_t dot = 0;
      for (int64_t d = 0; d < l.head_dim; d++) dot += int32_t(q8[d]) * (int32_t(tile[d / 4 * 64 + d % 4]) - 128);
      s[t] = float(dot) * (qs * get_float(head + l.key_scales() + t * 4));
    } else {
      float dot = 0.0f;
      for (int64_t d = 0; d < l.head_dim; d++)
        dot = fma1(q[d], get_float(head + ((t / 16 * l.head_dim + d) * 16 + t % 16) * 4), dot);
      s[t] = dot * scale;
    }
    if (a.softcap != 0.0f) s[t] = a.softcap * tanh1(s[t] / a.softcap);
    if (a.mask) s[t] = s[t] + a.mask[i * a.mask_token + h * a.mask_head + first + t];
    if (!plain) s[t] = s[t] * kLog2E;
    top = max1(top, s[t]);
  }
  const float shift = top == -infinity ? 0.0f : top;
  float sums[16] = {};
  for (int64_t t = begin; t < end; t++) {
    p[t] = exp2_of_negative1(s[t] - shift);
    sums[t % 16] = sums[t % 16] + p[t];
  }
  partial[0] = top;
  partial[1] = sum16(sums);
  if (l.type == KvType::float32) {
    for (int64_t t = begin; t < end; t++) {
      const uint8_t* row = head + l.values() + t * l.value_stride() * 4;
      for (int64_t d = 0; d < l.value_dim; d++) out[d] = fma1(p[t], get_float(row + d * 4), out[d]);
    }
    return;
  }
  float w[kChunkTokens] = {};
  int16_t qw[kChunkTokens];
  for (int64_t t = begin; t < end; t++) w[t] = p[t] > 0.0f ? p[t] * get_float(head + l.value_scales() + t * 4) : 0.0f;
  const float ws = quantize_values<int16_t, 32767>(w, kChunkTokens, qw);
  for (int64_t d = 0; d < l.value_dim; d++) {
    int32_t sum = 0;
    for (int64_t t = begin; t < end; t++)
      sum += int32_t(qw[t]) * int8_t(head[l.values() + (t / 2 * l.value_stride() + d) * 2 + t % 2]);
    out[d] = float(sum) * ws;
  }
}

void merge_into(float* acc, const float* part, int64_t floats) {
  if (part[0] == -__builtin_inff() && part[1] == 0.0f) return;
  const float top = max1(acc[0], part[0]);
  const float a = exp2_of_negative1(acc[0] - top), b = exp2_of_negative1(part[0] - top);
  acc[0] = top;
  acc[1] = fma1(part[1], b, acc[1] * a);
  for (int64_t d = kPartialHead; d < floats; d++) acc[d] = fma1(part[d], b, acc[d] * a);
}

void finish(const float* acc, int64_t value_dim, float* out) {
  const float inverse = acc[1] == 0.0f ? 0.0f : 1.0f / acc[1];
  for (int64_t d = 0; d < value_dim; d++) out[d] = acc[kPartialHead + d] * inverse;
}

void attention_partial(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end, int64_t chunk,
                       float* partial) {
  for (int64_t i = token_begin; i < token_end; i++)
    for (int64_t g = 0; g < a.group; g++, partial += partial_floats(a.layout))
      attend(a, kv_head, i, kv_head * a.group + g, chunk, partial);
}

void attention_merge(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end, int64_t chunks,
                     const float* partial, int64_t stride) {
  const int64_t floats = partial_floats(a.layout);
  for (int64_t i = token_begin; i < token_end; i++) {
    for (int64_t g = 0; g < a.group; g++, partial += floats) {
      float acc[kPartialHead + kMaxHeadDim] = {};
      acc[0] = -__builtin_inff();
      for (int64_t c = 0; c < chunks; c++) merge_into(acc, partial + c * stride, floats);
      finish(acc, a.layout.value_dim, a.out + i * a.ldo + (kv_head * a.group + g) * a.layout.value_dim);
    }
  }
}

void attention(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end) {
  for (int64_t i = token_begin; i < token_end; i++) {
    for (int64_t g = 0; g < a.group; g++) {
      float acc[kPartialHead + kMaxHeadDim] = {}, part[kPartialHead + kMaxHeadDim] = {};
      acc[0] = -__builtin_inff();
      for (int64_t c = a.begin[i] / kChunkTokens; c * kChunkTokens < a.end[i]; c++) {
        attend(a, kv_head, i, kv_head * a.group + g, c, part);
        merge_into(acc, part, partial_floats(a.layout));
      }
      finish(acc, a.layout.value_dim, a.out + i * a.ldo + (kv_head * a.group + g) * a.layout.value_dim);
    }
  }
}

}  // namespace

Kernels kernels_scalar() {
  Kernels k = {};
  k.isa = "scalar";
  k.quantize = quantize;
  k.linear[int(WeightType::q4a)] = linear_blocks<WeightType::q4a>;
  k.linear[int(WeightType::q4)] = linear_blocks<WeightType::q4>;
  k.linear[int(WeightType::q8)] = linear_blocks<WeightType::q8>;
  k.linear[int(WeightType::q8x16)] = linear_blocks<WeightType::q8x16>;
  k.linear[int(WeightType::q4x64)] = linear_wide<WeightType::q4x64>;
  k.linear[int(WeightType::q8x128)] = linear_wide<WeightType::q8x128>;
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

}  // namespace edgeformer
