// Attention over S (see simd.inl): up to kAttentionRows query rows of one KV head meet a chunk of kChunkTokens keys.

constexpr int kAttentionRows = 16;
constexpr int kTiles = int(kChunkTokens / 16);

// Scale of one row of n floats, and its quantized values (rounded up to 16 with zeros) at q.
inline float quantize_row(const float* x, int64_t n, int8_t* q) {
  I top = S::iset1(0);
  for (int64_t c = 0; c < n; c += 16) top = S::imax(top, S::bits(S::abs(load_tail(x + c, n - c))));
  const Scale s(S::imaximum(top));
  for (int64_t c = 0; c < n; c += 16) S::narrow(q + c, S::to_int(S::mul(load_tail(x + c, n - c), f16(s.inverse))));
  return s.scale;
}

inline void kv_append(const KvAppendArgs& a) {
  const KvLayout& l = a.layout;
  const int64_t d4 = round_up(l.head_dim, 4);
  for (int64_t i = 0; i < a.tokens; i++) {
    const int64_t t = (a.position + i) % kChunkTokens;
    for (int64_t h = a.head_begin; h < a.head_end; h++) {
      uint8_t* head = a.chunks[(a.position + i) / kChunkTokens] + h * l.head_bytes();
      const float* k = a.k + i * a.ldk + h * l.head_dim;
      const float* v = a.v + i * a.ldv + h * l.value_dim;
      if (l.type == KvType::float32) {
        float* keys = reinterpret_cast<float*>(head) + t / 16 * 16 * l.head_dim + t % 16;
        for (int64_t d = 0; d < l.head_dim; d++) keys[d * 16] = k[d];
        float* values = reinterpret_cast<float*>(head + l.values()) + t * l.value_stride();
        for (int64_t d = 0; d < l.value_dim; d += 16) S::store(values + d, load_tail(v + d, l.value_dim - d));
        continue;
      }
      alignas(64) int8_t q[kMaxHeadDim + 16];
      reinterpret_cast<float*>(head + l.key_scales())[t] = quantize_row(k, l.head_dim, q);
      uint8_t* keys = head + t / 16 * 16 * d4 + t % 16 * 4;
      for (int64_t d = 0; d < d4; d += 4) {
        uint32_t four;
        __builtin_memcpy(&four, q + d, 4);
        four ^= 0x80808080u;
        __builtin_memcpy(keys + d * 16, &four, 4);
      }
      reinterpret_cast<float*>(head + l.value_scales())[t] = quantize_row(v, l.value_dim, q);
      uint8_t* values = head + l.values() + t / 2 * l.value_stride() * 2 + t % 2;
      for (int64_t d = 0; d < l.value_stride(); d++) values[2 * d] = uint8_t(q[d]);
    }
  }
}

// The query rows of one call: row r is token `token` and query head `head`, and sees [begin, end) of the whole
// sequence.
struct Rows {
  int count;
  int64_t token[kAttentionRows], head[kAttentionRows];
  const float* q[kAttentionRows];
  float scale[kAttentionRows];
  int32_t offset[kAttentionRows];
  alignas(64) int8_t q8[kAttentionRows][kMaxHeadDim + 16];
};

inline void set_rows(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t first, int count,
                     Rows& rows) {
  rows.count = count;
  for (int r = 0; r < count; r++) {
    rows.token[r] = token_begin + (first + r) / a.group;
    rows.head[r] = kv_head * a.group + (first + r) % a.group;
    rows.q[r] = a.q + rows.token[r] * a.ldq + rows.head[r] * a.layout.head_dim;
    rows.scale[r] = a.scale;
    if (a.layout.type == KvType::float32) continue;
    rows.scale[r] = quantize_row(rows.q[r], a.layout.head_dim, rows.q8[r]) * a.scale;
    int32_t sum = 0;
    for (int64_t d = 0; d < a.layout.head_dim; d++) sum += rows.q8[r][d];
    rows.offset[r] = -128 * sum;
  }
}

// int8 dots of R rows with the 16 keys of one tile. The last step of a head_dim that 16 does not divide is cut.
template <int R>
inline void key_dots(const Rows& rows, int first, int64_t d4, const uint8_t* tile, const F key_scale,
                     float (*s)[kChunkTokens]) {
  typename S::ByteSum sum[R];
  each<R>([&](auto r) __attribute__((always_inline)) { sum[r] = S::bzero(rows.offset[first + r]); });
  int64_t d = 0;
  for (; d + 16 <= d4; d += 16) {
    const S::W w0 = S::byte_weight(tile + d * 16), w1 = S::byte_weight(tile + d * 16 + 64);
    const S::W w2 = S::byte_weight(tile + d * 16 + 128), w3 = S::byte_weight(tile + d * 16 + 192);
    each<R>([&](auto r) __attribute__((always_inline)) {
      const S::X x = S::load_x(rows.q8[first + r] + d);
      sum[r] = S::template bdot<0>(sum[r], w0, x);
      sum[r] = S::template bdot<1>(sum[r], w1, x);
      sum[r] = S::template bdot<2>(sum[r], w2, x);
      sum[r] = S::template bdot<3>(sum[r], w3, x);
    });
  }
  for (; d < d4; d += 4) {
    const S::W w = S::byte_weight(tile + d * 16);
    each<R>([&](auto r) __attribute__((always_inline)) {
      alignas(16) int8_t step[16];
      __builtin_memcpy(step, rows.q8[first + r] + d, 4);
      sum[r] = S::template bdot<0>(sum[r], w, S::load_x(step));
    });
  }
  each<R>([&](auto r) __attribute__((always_inline)) {
    S::store(s[r], S::mul(S::to_float(S::bsum(sum[r])), S::mul(f16(rows.scale[first + r]), key_scale)));
  });
}

template <int R>
inline void key_dots_f32(const Rows& rows, int first, int64_t head_dim, const float* tile, float (*s)[kChunkTokens]) {
  F acc[R];
  for (int r = 0; r < R; r++) acc[r] = f16(0.0f);
  for (int64_t d = 0; d < head_dim; d++) {
    const F k = S::load(tile + d * 16);
    for (int r = 0; r < R; r++) acc[r] = S::fma(f16(rows.q[first + r][d]), k, acc[r]);
  }
  for (int r = 0; r < R; r++) S::store(s[r], S::mul(acc[r], f16(rows.scale[first + r])));
}

// Scores of the chunk -> p, max and sum of one row; p is 0 for hidden keys of the tiles [tile_begin, tile_end).
inline void soften(const AttentionArgs& a, const Rows& rows, int r, int64_t chunk, int tile_begin, int tile_end,
                   float* s, float* max, float* sum) {
  const float infinity = __builtin_inff();
  const int64_t first = chunk * kChunkTokens;
  const int64_t begin = a.begin[rows.token[r]] - first, end = a.end[rows.token[r]] - first;
  F tops = f16(-infinity);
  for (int tile = tile_begin; tile < tile_end; tile++) {
    const int64_t t = tile * 16;
    F v = S::load(s + t);
    if (a.softcap != 0.0f) v = S::mul(f16(a.softcap), tanh16(S::div(v, f16(a.softcap))));
    if (t < begin || t + 16 > end) {  // the edge of what the row sees
      float lanes[16];
      S::store(lanes, v);
      const float* mask = a.mask ? a.mask + rows.token[r] * a.mask_token + rows.head[r] * a.mask_head + first : nullptr;
      for (int64_t l = 0; l < 16; l++) {
        const bool seen = t + l >= begin && t + l < end;
        lanes[l] = !seen ? -infinity : mask ? lanes[l] + mask[t + l] : lanes[l];
      }
      v = S::load(lanes);
    } else if (a.mask) {
      v = S::add(v, S::load(a.mask + rows.token[r] * a.mask_token + rows.head[r] * a.mask_head + first + t));
    }
    S::store(s + t, v);
    tops = S::max(tops, v);
  }
  const float top = S::maximum(tops);
  const F shift = f16(top == -infinity ? 0.0f : top);
  F sums = f16(0.0f);
  for (int tile = tile_begin; tile < tile_end; tile++) {
    const F p = exp16(S::sub(S::load(s + tile * 16), shift));
    S::store(s + tile * 16, p);
    sums = S::add(sums, p);
  }
  *max = top;
  *sum = S::sum(sums);
}

// p and the scales of the values -> the 15-bit weights of the values; returns their scale.
inline float weigh(const float* p, const float* value_scales, int64_t begin, int64_t end, int16_t* q) {
  alignas(64) float w[kChunkTokens];
  const F zero = f16(0.0f);
  I top = S::iset1(0);
  for (int64_t t = begin; t < end; t += 16) {
    const F v = S::load(p + t), product = S::mul(v, S::load(value_scales + t));
    const F seen = S::select_lt(zero, v, product, zero);
    S::store(w + t, seen);
    top = S::imax(top, S::bits(seen));  // none is negative
  }
  const Scale s(S::imaximum(top), 32767.0f);
  for (int64_t t = begin; t < end; t += 16) S::narrow16(q + t, S::to_int(S::mul(S::load(w + t), f16(s.inverse))));
  return s.scale;
}

// out[R][16 C] = sum over tokens of w[R][tokens] * v[tokens][16 C], times scale[R]. Of a pair that lies half outside,
// the other weight is 0.
template <int R, int C>
inline void add_pairs(const int16_t (*w)[kChunkTokens], const float* scale, int64_t begin, int64_t end,
                      const uint8_t* values, int64_t stride, float* out, int64_t ldo) {
  I acc[R * C];
  each<R * C>([&](auto i) __attribute__((always_inline)) { acc[i] = S::iset1(0); });
  for (int64_t t = begin / 2 * 2; t < end; t += 2) {
    typename S::Pairs v[C];
    each<C>([&](auto c) __attribute__((always_inline)) { v[c] = S::load_pairs(values + t * stride + 32 * c); });
    each<R>([&](auto r) __attribute__((always_inline)) {
      int32_t both;
      __builtin_memcpy(&both, w[r] + t, 4);
      each<C>([&](auto c) __attribute__((always_inline)) { acc[r * C + c] = S::pdot(acc[r * C + c], v[c], both); });
    });
  }
  each<R * C>([&](auto i) __attribute__((always_inline)) {
    S::store(out + i / C * ldo + 16 * (i % C), S::mul(S::to_float(acc[i]), f16(scale[i / C])));
  });
}

// out[R][16 C] = sum of p[R][tokens] * v[tokens][16 C], tokens ascending.
template <int R, int C>
inline void add_values(const float (*p)[kChunkTokens], int64_t begin, int64_t end, const uint8_t* values,
                       int64_t stride, float* out, int64_t ldo) {
  F acc[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) acc[r][c] = f16(0.0f);
  for (int64_t t = begin; t < end; t++) {
    F v[C];
    for (int c = 0; c < C; c++) v[c] = S::load(reinterpret_cast<const float*>(values) + t * stride + 16 * c);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) acc[r][c] = S::fma(f16(p[r][t]), v[c], acc[r][c]);
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) S::store(out + r * ldo + 16 * c, acc[r][c]);
}

// All rows against one chunk -> partials (see kernels.h).
inline void attend_chunk(const AttentionArgs& a, int64_t kv_head, int64_t chunk, const Rows& rows, float* partial) {
  const KvLayout& l = a.layout;
  const bool is_int8 = l.type == KvType::int8;
  const int64_t floats = partial_floats(l), d4 = round_up(l.head_dim, 4), first = chunk * kChunkTokens;
  int64_t begin = kChunkTokens, end = 0;  // what any of the rows sees of this chunk
  for (int r = 0; r < rows.count; r++) {
    const int64_t b = a.begin[rows.token[r]] - first, e = a.end[rows.token[r]] - first;
    if (b >= e || e <= 0 || b >= kChunkTokens) continue;
    begin = b < begin ? (b < 0 ? 0 : b) : begin;
    end = e > end ? (e > kChunkTokens ? kChunkTokens : e) : end;
  }
  if (begin >= end) {
    for (int r = 0; r < rows.count; r++) {
      partial[r * floats] = -__builtin_inff();
      partial[r * floats + 1] = 0.0f;
      for (int64_t d = kPartialHead; d < floats; d++) partial[r * floats + d] = 0.0f;
    }
    return;
  }
  const int tile_begin = int(begin / 16), tile_end = int((end + 15) / 16);
  const uint8_t* head = a.chunks[chunk] + kv_head * l.head_bytes();
  const float* key_scales = reinterpret_cast<const float*>(head + l.key_scales());
  const float* value_scales = reinterpret_cast<const float*>(head + l.value_scales());

  alignas(64) float s[kAttentionRows][kChunkTokens];
  alignas(64) int16_t w[kAttentionRows][kChunkTokens];
  float scale[kAttentionRows];
  for (int r = 0; r < rows.count; r += S::kGemvRows) {
    const int count = rows.count - r < S::kGemvRows ? rows.count - r : S::kGemvRows;
    with_count<S::kGemvRows>(count, [&](auto R) __attribute__((always_inline)) {
      for (int tile = tile_begin; tile < tile_end; tile++) {
        auto* to = reinterpret_cast<float (*)[kChunkTokens]>(&s[r][tile * 16]);
        if (is_int8)
          key_dots<decltype(R)::value>(rows, r, d4, head + tile * 16 * d4, S::load(key_scales + tile * 16), to);
        else
          key_dots_f32<decltype(R)::value>(rows, r, l.head_dim,
                                           reinterpret_cast<const float*>(head) + tile * 16 * l.head_dim, to);
      }
    });
  }
  for (int r = 0; r < rows.count; r++) {
    soften(a, rows, r, chunk, tile_begin, tile_end, s[r], partial + r * floats, partial + r * floats + 1);
    if (is_int8) scale[r] = weigh(s[r], value_scales, tile_begin * 16, tile_end * 16, w[r]);
  }
  const int64_t stride = l.value_stride();
  for (int r = 0; r < rows.count; r += S::kValueRows) {
    const int count = rows.count - r < S::kValueRows ? rows.count - r : S::kValueRows;
    with_count<S::kValueRows>(count, [&](auto R) __attribute__((always_inline)) {
      constexpr int n = decltype(R)::value, wide = S::kValueColumns;
      float* out = partial + r * floats + kPartialHead;
      const uint8_t* values = head + l.values();
      int64_t d = 0;
      for (; d + 16 * wide <= stride; d += 16 * wide) {
        if (is_int8)
          add_pairs<n, wide>(w + r, scale + r, begin, end, values + 2 * d, stride, out + d, floats);
        else
          add_values<n, wide>(s + r, begin, end, values + 4 * d, stride, out + d, floats);
      }
      for (; d < stride; d += 16) {
        if (is_int8)
          add_pairs<n, 1>(w + r, scale + r, begin, end, values + 2 * d, stride, out + d, floats);
        else
          add_values<n, 1>(s + r, begin, end, values + 4 * d, stride, out + d, floats);
      }
    });
  }
}

inline void merge_into(float* acc, const float* part, int64_t floats) {
  const float infinity = __builtin_inff();
  if (part[0] == -infinity && part[1] == 0.0f) return;
  if (acc[0] == -infinity && acc[1] == 0.0f) {
    for (int64_t d = 0; d < floats; d += 16) S::store(acc + d, S::load(part + d));
    return;
  }
  const float top = max1(acc[0], part[0]), a = exp1(acc[0] - top), b = exp1(part[0] - top);
  acc[0] = top;
  acc[1] = fma1(part[1], b, acc[1] * a);
  for (int64_t d = kPartialHead; d < floats; d += 16)
    S::store(acc + d, S::fma(S::load(part + d), f16(b), S::mul(S::load(acc + d), f16(a))));
}

inline void finish(const float* acc, int64_t value_dim, float* out) {
  const F inverse = f16(acc[1] == 0.0f ? 0.0f : 1.0f / acc[1]);
  for (int64_t d = 0; d < value_dim; d += 16)
    store_tail(out + d, S::mul(S::load(acc + kPartialHead + d), inverse), value_dim - d);
}

inline void attention_partial(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end,
                              int64_t chunk, float* partial) {
  const int64_t total = (token_end - token_begin) * a.group;
  Rows rows;
  for (int64_t first = 0; first < total; first += kAttentionRows) {
    set_rows(a, kv_head, token_begin, first, int(total - first < kAttentionRows ? total - first : kAttentionRows),
             rows);
    attend_chunk(a, kv_head, chunk, rows, partial + first * partial_floats(a.layout));
  }
}

inline void attention_merge(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end,
                            int64_t chunks, const float* partial, int64_t stride) {
  const int64_t floats = partial_floats(a.layout);
  for (int64_t i = token_begin; i < token_end; i++) {
    for (int64_t g = 0; g < a.group; g++, partial += floats) {
      alignas(64) float acc[kPartialHead + kMaxHeadDim];
      for (int64_t d = 0; d < floats; d++) acc[d] = 0.0f;
      acc[0] = -__builtin_inff();
      for (int64_t c = 0; c < chunks; c++) merge_into(acc, partial + c * stride, floats);
      finish(acc, a.layout.value_dim, a.out + i * a.ldo + (kv_head * a.group + g) * a.layout.value_dim);
    }
  }
}

inline void attention(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end) {
  alignas(64) float acc[kAttentionRows * (kPartialHead + kMaxHeadDim)];
  alignas(64) float part[kAttentionRows * (kPartialHead + kMaxHeadDim)];
  const int64_t floats = partial_floats(a.layout), total = (token_end - token_begin) * a.group;
  Rows rows;
  for (int64_t first = 0; first < total; first += kAttentionRows) {
    set_rows(a, kv_head, token_begin, first, int(total - first < kAttentionRows ? total - first : kAttentionRows),
             rows);
    int64_t begin = INT64_MAX, end = 0;
    for (int r = 0; r < rows.count; r++) {
      const int64_t b = a.begin[rows.token[r]], e = a.end[rows.token[r]];
      if (b < e && b < begin) begin = b;
      if (b < e && e > end) end = e;
      for (int64_t d = 0; d < floats; d++) acc[r * floats + d] = 0.0f;
      acc[r * floats] = -__builtin_inff();
    }
    for (int64_t c = begin / kChunkTokens; c * kChunkTokens < end; c++) {
      attend_chunk(a, kv_head, c, rows, part);
      for (int r = 0; r < rows.count; r++) merge_into(acc + r * floats, part + r * floats, floats);
    }
    for (int r = 0; r < rows.count; r++)
      finish(acc + r * floats, a.layout.value_dim, a.out + rows.token[r] * a.ldo + rows.head[r] * a.layout.value_dim);
  }
}
