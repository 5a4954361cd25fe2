// KV cache and attention of the scalar table. Included by scalar.cpp.

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

void attention_merge(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end,
                     const MergeArgs& merge) {
  const int64_t floats = partial_floats(a.layout);
  const float* partial = merge.partial;  // of the row, in chunk 0
  for (int64_t i = token_begin; i < token_end; i++) {
    for (int64_t g = 0; g < a.group; g++, partial += floats) {
      float acc[kPartialHead + kMaxHeadDim] = {};
      acc[0] = -__builtin_inff();
      for (int64_t c = 0; c < merge.chunks; c++) merge_into(acc, partial + c * merge.stride, floats);
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
