// Floats -> int8: activations by blocks, and the keys and values of the KV cache. Included by simd.inl.

// The formula at QuantizeArgs, 16 blocks at a time across rows: one division gives 16 scales, and blocks are
// independent. whole: every block has 32 columns. shared: blocks of one span: 1, 2 or 4, from a multiple of it on.
template <bool whole, int shared>
inline void quantize_blocks(const QuantizeArgs& args) {
  const QuantizeArgs a = args;  // a copy: what is stored cannot change it, so it stays in registers
  const int64_t blocks = blocks_of(a.k), all = a.m * (a.block_end - a.block_begin);
  const F least = f16(0x1p-100f), zero = f16(0.0f), limit = f16(127.0f);
  int64_t row = 0, g = a.block_begin;
  for (int64_t done = 0; done < all; done += 16) {
    const int64_t count = all - done < 16 ? all - done : 16, fours = round_up(count, 4);
    const float* from[16];
    int64_t columns[16], to[16];
    for (int64_t j = 0; j < fours; j++) {
      from[j] = a.x + row * a.ldx + g * kBlock;
      columns[j] = a.k - g * kBlock;
      to[j] = row * blocks + g;
      if (j + 1 < count && ++g == a.block_end) {  // repeats of the last block fill up the four; it is written once
        g = a.block_begin;
        row++;
      }
    }
    if (++g == a.block_end) {
      g = a.block_begin;
      row++;
    }
    const auto low = [&](int64_t j) __attribute__((always_inline)) {
      return whole ? S::load(from[j]) : load_tail(from[j], columns[j]);
    };
    const auto high = [&](int64_t j) __attribute__((always_inline)) {
      return whole ? S::load(from[j] + 16) : columns[j] > 16 ? load_tail(from[j] + 16, columns[j] - 16) : zero;
    };
    S::Quad tops[4] = {};
    for (int64_t j = 0; j < fours; j += 4) {
      I v[4];
      each<4>([&](auto e) __attribute__((always_inline)) {
        v[e] = S::imax(S::bits(S::abs(low(j + e))), S::bits(S::abs(high(j + e))));
      });
      tops[j / 4] = S::tops4(v[0], v[1], v[2], v[3]);
      if constexpr (shared > 1) tops[j / 4] = S::template top_of<shared>(tops[j / 4]);
    }
    alignas(64) float scale[16], inverse[16];
    const F top = S::join(tops[0], tops[1], tops[2], tops[3]);
    S::store(scale, S::select_lt(top, least, zero, S::div(top, limit)));
    S::store(inverse, S::select_lt(top, least, zero, S::div(limit, top)));
    for (int64_t j = 0; j < count; j += 2) {
      I v[4];
      each<4>([&](auto e) __attribute__((always_inline)) {
        const int64_t b = j + e / 2;
        v[e] = S::to_int(S::mul(e % 2 ? high(b) : low(b), f16(inverse[b])));
      });
      int32_t halves[4];
      S::put_blocks(a.xq + to[j] * kBlock, a.xq + to[j + 1] * kBlock, v[0], v[1], v[2], v[3], halves);
      each<2>([&](auto e) __attribute__((always_inline)) {
        const int32_t sum = halves[2 * e] + halves[2 * e + 1];
        a.xb[to[j + e]] = {scale[j + e], scale[j + e] * float(sum), -128 * sum, -128 * halves[2 * e]};
      });
    }
    if (shared > 1) {
      for (int64_t j = 0; j < count; j += shared) {
        int32_t sum = 0;
        for (int e = 0; e < shared; e++) sum += a.xb[to[j + e]].offset;
        for (int e = 0; e < shared; e++) a.xb[to[j + e]].offset_part = sum;
      }
    }
  }
}

inline void quantize(const QuantizeArgs& a) {
  if (a.span == 4 * kBlock)
    quantize_blocks<true, 4>(a);
  else if (a.span == 2 * kBlock)
    quantize_blocks<true, 2>(a);
  else if (a.block_end * kBlock <= a.k)
    quantize_blocks<true, 1>(a);
  else
    quantize_blocks<false, 1>(a);
}

// absmax / 127 and 127 / absmax, both 0 for absmax < 2^-100; given absmax by its bits.
struct Scale {
  float scale, inverse;
  explicit Scale(int32_t top_bits) {
    float absmax;
    __builtin_memcpy(&absmax, &top_bits, 4);
    scale = absmax < 0x1p-100f ? 0.0f : absmax / 127.0f;
    inverse = absmax < 0x1p-100f ? 0.0f : 127.0f / absmax;
  }
};

// q[c] = round_to_even(x[c] * (127 / absmax)), n rounded up to 16 with zeros; *sum = sum of q. Returns absmax / 127.
inline float quantize_row(const float* x, int64_t n, int8_t* q, int32_t* sum = nullptr) {
  I top = S::iset1(0), sums = S::iset1(0);
  for (int64_t c = 0; c < n; c += 16) top = S::imax(top, S::bits(S::abs(load_tail(x + c, n - c))));
  const Scale s(S::imaximum(top));
  for (int64_t c = 0; c < n; c += 16) {
    const I v = S::to_int(S::mul(load_tail(x + c, n - c), f16(s.inverse)));
    S::narrow(q + c, v);
    sums = S::iadd(sums, v);
  }
  if (sum) *sum = S::isum(sums);
  return s.scale;
}

// Writes token t (of a chunk) of one head: k[head_dim], v[value_dim]. Layout: KvLayout in kernels.h.
inline void append_int8(const KvLayout& l, uint8_t* head, int64_t t, const float* k, const float* v) {
  const int64_t d4 = round_up(l.head_dim, 4);
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
  uint8_t* values = head + l.values() + t / 2 * l.value_stride() * 2;
  for (int64_t d = 0; d < l.value_stride(); d += 16) S::put_every_second(values + 2 * d, q + d, int(t % 2));
}

inline void append_float(const KvLayout& l, uint8_t* head, int64_t t, const float* k, const float* v) {
  float* keys = reinterpret_cast<float*>(head) + t / 16 * 16 * l.head_dim + t % 16;
  for (int64_t d = 0; d < l.head_dim; d++) keys[d * 16] = k[d];
  float* values = reinterpret_cast<float*>(head + l.values()) + t * l.value_stride();
  for (int64_t d = 0; d < l.value_dim; d += 16) S::store(values + d, load_tail(v + d, l.value_dim - d));
}

inline void kv_append(const KvAppendArgs& a) {
  const KvLayout& l = a.layout;
  for (int64_t i = 0; i < a.tokens; i++) {
    const int64_t t = (a.position + i) % kChunkTokens;
    for (int64_t h = a.head_begin; h < a.head_end; h++) {
      uint8_t* head = a.chunks[(a.position + i) / kChunkTokens] + h * l.head_bytes();
      const float *k = a.k + i * a.ldk + h * l.head_dim, *v = a.v + i * a.ldv + h * l.value_dim;
      l.type == KvType::int8 ? append_int8(l, head, t, k, v) : append_float(l, head, t, k, v);
    }
  }
}
