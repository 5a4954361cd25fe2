// Attention over S (see simd.inl): up to kAttentionRows query rows of one KV head at once. Formula: kernels.h.

constexpr int kAttentionRows = 16;

#include "kernels/simd/simd_partials.inl"

// The query rows of one call: row r is query token token[r], query head head[r].
struct Rows {
  int count;
  int64_t token[kAttentionRows], head[kAttentionRows];
  const float* q[kAttentionRows];
  float scale[kAttentionRows];     // S of the formula; int8: qs * S
  int32_t offset[kAttentionRows];  // int8: -128 * sum of q8
  alignas(64) int8_t q8[kAttentionRows][kMaxHeadDim + 16];
};

inline bool is_plain(const AttentionArgs& a) { return a.softcap == 0.0f && !a.mask; }

inline void set_rows(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t first, int count,
                     Rows& rows) {
  rows.count = count;
  const float scale = is_plain(a) ? a.scale * kLog2E : a.scale;
  for (int r = 0; r < count; r++) {
    rows.token[r] = token_begin + (first + r) / a.group;
    rows.head[r] = kv_head * a.group + (first + r) % a.group;
    rows.q[r] = a.q + rows.token[r] * a.ldq + rows.head[r] * a.layout.head_dim;
    rows.scale[r] = scale;
    if (a.layout.type == KvType::float32) continue;
    int32_t sum;
    rows.scale[r] = quantize_row(rows.q[r], a.layout.head_dim, rows.q8[r], &sum) * scale;
    rows.offset[r] = -128 * sum;
  }
}

// s[r][16 t + l] = float(sum over d of q8[r][d] * k[t, l][d]) * (scale[r] * key_scales[16 t + l]), for R rows and T
// tiles of 16 keys. d4: head_dim rounded up to 4.
template <int R, int T>
inline void key_dots(const Rows& rows, int first, int64_t d4, const uint8_t* tile, const float* key_scales,
                     float (*s)[kChunkTokens]) {
  typename S::ByteSum sum[R * T];
  each<R * T>([&](auto i) __attribute__((always_inline)) { sum[i] = S::bzero(rows.offset[first + i / T]); });
  // 4 columns at `d`, step `index` of x[R]
  const auto dots = [&](auto index, int64_t d, const S::X(&x)[R]) __attribute__((always_inline)) {
    S::W w[T];
    each<T>([&](auto t) __attribute__((always_inline)) { w[t] = S::byte_weight(tile + t * 16 * d4 + d * 16); });
    each<R * T>([&](auto i) __attribute__((always_inline)) {
      sum[i] = S::template bdot<decltype(index)::value>(sum[i], w[i % T], x[i / T]);
    });
  };
  S::X x[R];
  int64_t d = 0;
  for (; d + 16 <= d4; d += 16) {
    each<R>([&](auto r) __attribute__((always_inline)) { x[r] = S::load_x(rows.q8[first + r] + d); });
    each<4>([&](auto index) __attribute__((always_inline)) { dots(index, d + 4 * index, x); });
  }
  if (d < d4) {  // q8 has zeros from head_dim on
    each<R>([&](auto r) __attribute__((always_inline)) { x[r] = S::load_x(rows.q8[first + r] + d); });
    each<3>([&](auto index) __attribute__((always_inline)) {
      if (d + 4 * index < d4) dots(index, d + 4 * index, x);
    });
  }
  each<R * T>([&](auto i) __attribute__((always_inline)) {
    const F scale = S::mul(f16(rows.scale[first + i / T]), S::load(key_scales + i % T * 16));
    S::store(s[i / T] + i % T * 16, S::mul(S::to_float(S::bsum(sum[i])), scale));
  });
}

// s[r][l] = (fma over d ascending of q[r][d] * k[l][d]) * scale[r], for R rows and one tile of 16 keys.
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

// The keys [begin, end) of a chunk that a row sees. whole(tile): all 16 keys of the tile.
struct Seen {
  int64_t begin, end;
  bool whole(int64_t tile) const { return tile * 16 >= begin && tile * 16 + 16 <= end; }
};

inline Seen seen_by(const AttentionArgs& a, int64_t token, int64_t chunk) {
  const int64_t first = chunk * kChunkTokens, b = a.begin[token] - first, e = a.end[token] - first;
  if (b >= e || e <= 0 || b >= kChunkTokens) return {0, 0};
  return {b < 0 ? 0 : b, e > kChunkTokens ? kChunkTokens : e};
}

// One chunk of one KV head, in the layout of KvLayout.
struct Chunk {
  int64_t index;
  const uint8_t *keys, *values;
  const float *key_scales, *value_scales;  // null for float32
  int64_t tile_begin, tile_end;            // the tiles of 16 keys that some row sees
};

// s = softcap * tanh(s / softcap); s += mask; s *= log2(e), on the 16 scores of a tile. mask: of this row and chunk.
inline F bend(const AttentionArgs& a, F v, const float* mask, int64_t tile, const Seen& seen) {
  if (a.softcap != 0.0f) v = S::mul(f16(a.softcap), tanh16(S::div(v, f16(a.softcap))));
  if (mask && seen.whole(tile)) {
    v = S::add(v, S::load(mask + tile * 16));
  } else if (mask) {  // the mask may have no memory for keys that the row does not see
    float lanes[16];
    S::store(lanes, v);
    for (int64_t l = 0; l < 16; l++)
      if (tile * 16 + l >= seen.begin && tile * 16 + l < seen.end) lanes[l] += mask[tile * 16 + l];
    v = S::load(lanes);
  }
  return S::mul(v, f16(kLog2E));
}

// Finishes the scores of row r: softcap, mask, -inf for hidden keys. Returns their maximum.
inline float top_score(const AttentionArgs& a, const Rows& rows, int r, const Seen& seen, const Chunk& chunk,
                       float* s) {
  alignas(64) static constexpr float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F hidden = f16(-__builtin_inff());
  F tops = hidden;
  if (!is_plain(a)) {
    const float* mask = a.mask;
    if (mask) mask += rows.token[r] * a.mask_token + rows.head[r] * a.mask_head + chunk.index * kChunkTokens;
    for (int64_t t = chunk.tile_begin; t < chunk.tile_end; t++)
      S::store(s + t * 16, bend(a, S::load(s + t * 16), mask, t, seen));
  }
  for (int64_t t = chunk.tile_begin; t < chunk.tile_end; t++) {
    F v = S::load(s + t * 16);
    if (!seen.whole(t)) {
      const F index = S::load(kIndex);
      v = S::select_lt(index, f16(float(seen.begin - t * 16)), hidden, v);
      v = S::select_lt(index, f16(float(seen.end - t * 16)), v, hidden);
      S::store(s + t * 16, v);
    }
    tops = S::max(tops, v);
  }
  return S::maximum(tops);
}

// Replaces s by p = 2^(s - top); returns the sum of p over 16 lanes. int8: by p * value_scales, and *most = the largest
// of these.
inline float soften(float top, const Seen& seen, const Chunk& chunk, float* s, float* most) {
  const F shift = f16(top == -__builtin_inff() ? 0.0f : top), zero = f16(0.0f);
  F sums = zero, mosts = zero;
  for (int64_t t = chunk.tile_begin; t < chunk.tile_end; t++) {
    const F p = exp2_of_negative16(S::sub(S::load(s + t * 16), shift));
    sums = S::add(sums, p);
    F w = p;
    if (chunk.value_scales) {
      w = S::mul(p, S::load(chunk.value_scales + t * 16));
      if (!seen.whole(t)) w = S::select_lt(zero, p, w, zero);  // a hidden key's scale may be anything
      mosts = S::max(w, mosts);
    }
    S::store(s + t * 16, w);
  }
  if (chunk.value_scales) *most = S::maximum(mosts);
  return S::sum(sums);
}

// Columns of a chunk's values, from the one that `data` has for token 0 on; tokens in [begin, end).
struct Values {
  const uint8_t* data;
  int64_t stride;  // columns of a token
  int64_t begin, end;
  const uint8_t* ahead;  // 64 bytes a token are asked for meanwhile; or null
};

// out[r][16 C] = float(sum over t of w[r][t] * v[t][16 C]) * scale[r], by pairs of tokens; outside [begin, end) w is 0.
template <int R, int C>
inline void add_pairs(const int16_t (*w)[kChunkTokens], const float* scale, const Values& values, float* out,
                      int64_t ldo) {
  I acc[R * C];
  each<R * C>([&](auto i) __attribute__((always_inline)) { acc[i] = S::iset1(0); });
  for (int64_t t = values.begin / 2 * 2; t < values.end; t += 2) {
    typename S::Pairs v[C];
    each<C>([&](auto c)
                __attribute__((always_inline)) { v[c] = S::load_pairs(values.data + t * values.stride + 32 * c); });
    if (values.ahead) prefetch_bytes<0>(values.ahead + t * 64, 128);
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

// out[r][16 C] = fma over t ascending of p[r][t] * v[t][16 C].
template <int R, int C>
inline void add_values(const float (*p)[kChunkTokens], const Values& values, float* out, int64_t ldo) {
  F acc[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) acc[r][c] = f16(0.0f);
  for (int64_t t = values.begin; t < values.end; t++) {
    const float* row = reinterpret_cast<const float*>(values.data) + t * values.stride;
    F v[C];
    for (int c = 0; c < C; c++) v[c] = S::load(row + 16 * c);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) acc[r][c] = S::fma(f16(p[r][t]), v[c], acc[r][c]);
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) S::store(out + r * ldo + 16 * c, acc[r][c]);
}

// Partials of all rows for one chunk. ahead: as AttentionArgs::ahead.
inline void attend_chunk(const AttentionArgs& a, int64_t kv_head, int64_t index, const Rows& rows, const uint8_t* ahead,
                         Partials& part) {
  const KvLayout& l = a.layout;
  const bool is_int8 = l.type == KvType::int8;
  const int64_t d4 = round_up(l.head_dim, 4), stride = l.value_stride();
  Seen seen[kAttentionRows];
  int64_t begin = kChunkTokens, end = 0;  // the keys that some row sees
  for (int r = 0; r < rows.count; r++) {
    seen[r] = seen_by(a, rows.token[r], index);
    if (seen[r].begin >= seen[r].end) continue;
    begin = seen[r].begin < begin ? seen[r].begin : begin;
    end = seen[r].end > end ? seen[r].end : end;
  }
  if (begin >= end) {
    for (int r = 0; r < rows.count; r++) {
      part.top[r] = -__builtin_inff();
      part.sum[r] = 0.0f;
      for (int64_t d = 0; d < stride; d += 16) S::store(part.out + r * part.ldo + d, f16(0.0f));
    }
    return;
  }
  const uint8_t* head = a.chunks[index] + kv_head * l.head_bytes();
  const auto scales = [&](int64_t at) { return is_int8 ? reinterpret_cast<const float*>(head + at) : nullptr; };
  const Chunk chunk = {index,      head,           head + l.values(), scales(l.key_scales()), scales(l.value_scales()),
                       begin / 16, (end + 15) / 16};

  // With few rows memory is the limit: scales are asked for before the keys, values beside the same tokens' keys.
  const bool few = is_int8 && rows.count <= S::kKeyRows;
  if (few) {
    prefetch_bytes<0>(chunk.key_scales + chunk.tile_begin * 16, (chunk.tile_end - chunk.tile_begin) * 64);
    prefetch_bytes<0>(chunk.value_scales + chunk.tile_begin * 16, (chunk.tile_end - chunk.tile_begin) * 64);
  }
  alignas(64) float s[kAttentionRows][kChunkTokens];
  for (int r = 0; r < rows.count; r += S::kKeyRows) {
    const int count = rows.count - r < S::kKeyRows ? rows.count - r : S::kKeyRows;
    with_count<S::kKeyRows>(count, [&](auto R) __attribute__((always_inline)) {
      constexpr int n = decltype(R)::value, tiles = S::kKeyTiles;
      int64_t t = chunk.tile_begin;
      if (is_int8) {
        const auto at = [&](int64_t t) { return reinterpret_cast<float (*)[kChunkTokens]>(&s[r][t * 16]); };
        for (; t + tiles <= chunk.tile_end; t += tiles) {
          if (few) prefetch_bytes<0>(chunk.values + t * 16 * stride, tiles * 16 * stride);
          key_dots<n, tiles>(rows, r, d4, chunk.keys + t * 16 * d4, chunk.key_scales + t * 16, at(t));
        }
        for (; t < chunk.tile_end; t++)
          key_dots<n, 1>(rows, r, d4, chunk.keys + t * 16 * d4, chunk.key_scales + t * 16, at(t));
      }
      for (; t < chunk.tile_end; t++)
        key_dots_f32<n>(rows, r, l.head_dim, reinterpret_cast<const float*>(chunk.keys) + t * 16 * l.head_dim,
                        reinterpret_cast<float (*)[kChunkTokens]>(&s[r][t * 16]));
    });
  }
  // Each stage over all rows: the rows' dependency chains overlap.
  alignas(64) float scale[kAttentionRows] = {}, inverse[kAttentionRows];
  for (int r = 0; r < rows.count; r++) part.top[r] = top_score(a, rows, r, seen[r], chunk, s[r]);
  for (int r = 0; r < rows.count; r++) part.sum[r] = soften(part.top[r], seen[r], chunk, s[r], scale + r);

  alignas(64) int16_t w[kAttentionRows][kChunkTokens];  // 15-bit weights of the values
  if (is_int8) {
    const F most = S::load(scale), least = f16(0x1p-100f), zero = f16(0.0f);
    S::store(scale, S::select_lt(most, least, zero, S::div(most, f16(32767.0f))));
    S::store(inverse, S::select_lt(most, least, zero, S::div(f16(32767.0f), most)));
    for (int r = 0; r < rows.count; r++)
      for (int64_t t = chunk.tile_begin * 16; t < chunk.tile_end * 16; t += 16)
        S::narrow16(w[r] + t, S::to_int(S::mul(S::load(s[r] + t), f16(inverse[r]))));
  }
  for (int r = 0; r < rows.count; r += S::kValueRows) {
    const int count = rows.count - r < S::kValueRows ? rows.count - r : S::kValueRows;
    with_count<S::kValueRows>(count, [&](auto R) __attribute__((always_inline)) {
      constexpr int n = decltype(R)::value;
      constexpr int wide = n * S::kValueColumns > S::kValueSums ? S::kValueColumns / 2 : S::kValueColumns;
      float* out = part.out + r * part.ldo;
      // the values from column d on: 2 bytes a pair of tokens, or 4 a token
      const auto from = [&](int64_t d) {
        return Values{chunk.values + (is_int8 ? 2 : 4) * d, stride, begin, end, few && !(r + d) ? ahead : nullptr};
      };
      int64_t d = 0;
      for (; d + 16 * wide <= stride; d += 16 * wide) {
        if (is_int8)
          add_pairs<n, wide>(w + r, scale + r, from(d), out + d, part.ldo);
        else
          add_values<n, wide>(s + r, from(d), out + d, part.ldo);
      }
      for (; d < stride; d += 16) {
        if (is_int8)
          add_pairs<n, 1>(w + r, scale + r, from(d), out + d, part.ldo);
        else
          add_values<n, 1>(s + r, from(d), out + d, part.ldo);
      }
    });
  }
}

inline void attention_partial(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end,
                              int64_t chunk, float* partial) {
  const int64_t total = (token_end - token_begin) * a.group, floats = partial_floats(a.layout);
  Rows rows;
  Partials part;
  part.ldo = floats;
  for (int64_t first = 0; first < total; first += kAttentionRows, partial += kAttentionRows * floats) {
    set_rows(a, kv_head, token_begin, first, int(total - first < kAttentionRows ? total - first : kAttentionRows),
             rows);
    part.out = partial + kPartialHead;
    attend_chunk(a, kv_head, chunk, rows, a.ahead, part);
    for (int r = 0; r < rows.count; r++) {
      partial[r * floats] = part.top[r];
      partial[r * floats + 1] = part.sum[r];
    }
  }
}

inline void attention_merge(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end,
                            const MergeArgs& merge) {
  const int64_t floats = partial_floats(a.layout), n = floats - kPartialHead;
  const float* partial = merge.partial;  // of the row, in chunk 0
  for (int64_t i = token_begin; i < token_end; i++) {
    for (int64_t g = 0; g < a.group; g++, partial += floats) {
      alignas(64) float acc[kMaxHeadDim];
      for (int64_t d = 0; d < n; d++) acc[d] = 0.0f;
      float top = -__builtin_inff(), sum = 0.0f;
      for (int64_t c = 0; c < merge.chunks; c++) {
        const float* part = partial + c * merge.stride;
        if (is_empty(part[0], part[1])) continue;
        const float most = max1(top, part[0]);
        const float factor = exp2_of_negative1(top - most), part_factor = exp2_of_negative1(part[0] - most);
        top = most;
        sum = fma1(part[1], part_factor, sum * factor);
        add_scaled(acc, factor, part + kPartialHead, part_factor, n);
      }
      finish(sum, acc, a.layout.value_dim, a.out + i * a.ldo + (kv_head * a.group + g) * a.layout.value_dim);
    }
  }
}

inline void attention(const AttentionArgs& a, int64_t kv_head, int64_t token_begin, int64_t token_end) {
  alignas(64) float acc_out[kAttentionRows * kMaxHeadDim], part_out[kAttentionRows * kMaxHeadDim];
  const int64_t n = a.layout.value_stride(), total = (token_end - token_begin) * a.group;
  Rows rows;
  Partials acc, part;
  acc.ldo = part.ldo = n;
  acc.out = acc_out;
  part.out = part_out;
  for (int64_t first = 0; first < total; first += kAttentionRows) {
    set_rows(a, kv_head, token_begin, first, int(total - first < kAttentionRows ? total - first : kAttentionRows),
             rows);
    int64_t begin = INT64_MAX, end = 0;
    for (int r = 0; r < rows.count; r++) {
      const int64_t b = a.begin[rows.token[r]], e = a.end[rows.token[r]];
      if (b < e && b < begin) begin = b;
      if (b < e && e > end) end = e;
    }
    for (int64_t d = 0; d < rows.count * n; d += 16) S::store(acc_out + d, f16(0.0f));
    for (int r = 0; r < kAttentionRows; r++) {
      acc.top[r] = part.top[r] = -__builtin_inff();
      acc.sum[r] = part.sum[r] = 0.0f;
    }
    for (int64_t c = begin / kChunkTokens; c * kChunkTokens < end; c++) {
      const bool is_last = (c + 1) * kChunkTokens >= end;
      attend_chunk(a, kv_head, c, rows, is_last ? a.ahead : a.chunks[c + 1] + kv_head * a.layout.head_bytes(), part);
      merge_rows(rows.count, acc, part, n);
    }
    for (int r = 0; r < rows.count; r++)
      finish(acc.sum[r], acc_out + r * n, a.layout.value_dim,
             a.out + rows.token[r] * a.ldo + rows.head[r] * a.layout.value_dim);
  }
}
