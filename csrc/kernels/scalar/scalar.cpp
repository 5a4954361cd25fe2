// The scalar table: plain loops, one element at a time, the formulas of kernels.h written out.
//
// It shares no code with the SIMD tables: it is their reference in the tests, and the table of CPUs that no other table
// fits. Without an fma instruction the C library's fma runs; both round correctly, so the bits are the same.
#include "kernels/kernels.h"
#include "kernels/scalar/scalar_math.h"

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

// q[c] = round_to_even(x[c] * (limit / absmax)), in -limit .. limit; returns absmax / limit. absmax < 2^-100: zeros.
// absmax is found by comparing bits, so that a NaN is the largest.
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

void quantize_wide(const QuantizeArgs& a) {
  for (int64_t i = 0; i < a.m; i++) {
    for (int64_t c = a.block_begin * kBlock; c < a.block_end * kBlock; c += a.span) {
      int8_t* q = a.xq + i * a.k + c;
      const float scale = quantize_values(a.x + i * a.ldx + c, a.span, q);
      int32_t all = 0;
      for (int64_t j = 0; j < a.span; j++) all += q[j];
      for (int64_t j = 0; j < a.span; j += kBlock) {
        int32_t sum = 0;
        for (int64_t d = 0; d < kBlock; d++) sum += q[j + d];
        a.xb[(i * a.k + c + j) / kBlock] = {scale, scale * float(sum), -128 * sum, -128 * all};
      }
    }
  }
}

void quantize(const QuantizeArgs& a) {
  if (a.span > kBlock) return quantize_wide(a);
  const int64_t blocks = blocks_of(a.k);
  for (int64_t i = 0; i < a.m; i++) {
    for (int64_t g = a.block_begin; g < a.block_end; g++) {
      float values[kBlock];
      for (int64_t c = 0; c < kBlock; c++) values[c] = g * kBlock + c < a.k ? a.x[i * a.ldx + g * kBlock + c] : 0.0f;
      int8_t* q = a.xq + (i * blocks + g) * kBlock;
      XBlock& b = a.xb[i * blocks + g];
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

int32_t byte_at(const uint8_t* block, int64_t row, int64_t c) {
  return byte_weight(block[c / 4 * 64 + row * 4 + c % 4]);
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
        const int32_t w =
            nibbles ? nibble(block + head, row, c) - (type == WeightType::q4 ? 8 : 0) : byte_at(block + head, row, c);
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
               (nibbles ? nibble(w, row, c % kBlock) - 8 : byte_at(w, row, c % kBlock));
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

void rms_norm(const NormArgs& a) {
  for (int64_t i = 0; i < a.m; i++) {
    const float* row = a.x + i * a.ldx;
    float s[16] = {};
    for (int64_t c = 0; c < a.n; c++) s[c % 16] = fma1(row[c], row[c], s[c % 16]);
    const float r = 1.0f / sqrt1(sum16(s) / float(a.n) + a.eps);
    for (int64_t c = 0; c < a.n; c++) {
      const float v = row[c] * r;
      a.y[i * a.ldy + c] = a.weight ? v * a.weight[c] : v;
    }
  }
}

void layer_norm(const NormArgs& a) {
  for (int64_t i = 0; i < a.m; i++) {
    const float* row = a.x + i * a.ldx;
    float s[16] = {};
    for (int64_t c = 0; c < a.n; c++) s[c % 16] = s[c % 16] + row[c];
    const float mean = sum16(s) / float(a.n);
    float v[16] = {};
    for (int64_t c = 0; c < a.n; c++) v[c % 16] = fma1(row[c] - mean, row[c] - mean, v[c % 16]);
    const float r = 1.0f / sqrt1(sum16(v) / float(a.n) + a.eps);
    for (int64_t c = 0; c < a.n; c++)
      a.y[i * a.ldy + c] = fma1((row[c] - mean) * r, a.weight ? a.weight[c] : 1.0f, a.bias ? a.bias[c] : 0.0f);
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

double exponential_sums(const float* x, int64_t n, float top, double* sums) {
  double all = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    float s[16] = {}, products[16] = {};
    for (int64_t c = 0; begin + c < n && c < kSumBlock; c++) {
      const float d = max1(kLowest, x[begin + c] - top), e = exp1(d);
      s[c % 16] = s[c % 16] + e;
      products[c % 16] = fma1(e, d, products[c % 16]);
    }
    *sums++ = double(sum16(s));
    all = all + double(sum16(products));
  }
  return all;
}

int64_t places_reaching(const float* x, int64_t n, float bound, int64_t* places) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++)
    if (x[i] >= bound) places[count++] = i;
  return count;
}

int64_t place_of_largest(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 0; i < n; i++) {
    if (x[i] != x[i]) return i;
    if (x[i] > x[best]) best = i;
  }
  return best;
}

void rope(const RopeArgs& args) {
  const int64_t half = args.rotary / 2;
  for (int64_t i = 0; i < args.m; i++) {
    for (int64_t h = 0; h < args.heads; h++) {
      const float* from = args.x + i * args.ldx + h * args.head_dim;
      float* to = args.y + i * args.ldy + h * args.head_dim;
      for (int64_t j = 0; j < half; j++) {
        const int64_t at_a = args.interleaved ? 2 * j : j, at_b = args.interleaved ? 2 * j + 1 : j + half;
        const float a = from[at_a], b = from[at_b], c = args.cos[i * args.ldc + j], s = args.sin[i * args.ldc + j];
        to[at_a] = a * c - b * s;
        to[at_b] = b * c + a * s;
      }
      for (int64_t j = args.rotary; j < args.head_dim; j++) to[j] = from[j];
    }
  }
}

#include "kernels/scalar/scalar_attention.inl"

}  // namespace

Kernels kernels_scalar() {
  Kernels k = {};
  k.isa = "scalar";
  k.linear[int(WeightType::q4a)] = linear_blocks<WeightType::q4a>;
  k.linear[int(WeightType::q4)] = linear_blocks<WeightType::q4>;
  k.linear[int(WeightType::q8)] = linear_blocks<WeightType::q8>;
  k.linear[int(WeightType::q8x16)] = linear_blocks<WeightType::q8x16>;
  k.linear[int(WeightType::q4x64)] = linear_wide<WeightType::q4x64>;
  k.linear[int(WeightType::q8x128)] = linear_wide<WeightType::q8x128>;
  k.linear[int(WeightType::f32)] = linear_f32;
#define EDGEFORMER_SET(name) k.name = name;
  EDGEFORMER_KERNELS(EDGEFORMER_SET)
#undef EDGEFORMER_SET
  return k;
}

}  // namespace edgeformer
