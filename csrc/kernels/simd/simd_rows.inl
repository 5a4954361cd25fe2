// Row kernels over S (see simd.inl): epilogues, norms, softmax, passes over a vocabulary, rope. Their formulas: Kernels in kernels.h.

inline void epilogue(const EpilogueArgs& a) {
  with_unary(a.activation, [&](auto f) __attribute__((always_inline)) {
    const F scale = f16(a.scale);
    for (int64_t i = 0; i < a.m; i++) {
      float* y = a.y + i * a.ldy;
      const float* residual = a.residual ? a.residual + i * a.ldr : nullptr;
      for (int64_t c = 0; c < a.columns; c += 16) {
        const int64_t n = a.columns - c;
        F v = load_tail(y + c, n);
        if (a.bias) v = S::add(v, load_tail(a.bias + c, n));
        v = S::mul(f(v), scale);
        if (residual) v = S::add(v, load_tail(residual + c, n));
        store_tail(y + c, v, n);
      }
    }
  });
}

inline void gated(const GatedArgs& a) {
  with_unary(a.activation, [&](auto f) __attribute__((always_inline)) {
    for (int64_t i = 0; i < a.m; i++) {
      const float* y = a.y + i * a.ldy;
      for (int64_t c = 0; c < a.columns; c += 16) {
        const int64_t n = a.columns - c;
        F gate = load_tail(y + 2 * c, n), up = load_tail(y + 2 * c + 16, n);
        if (a.bias) {
          gate = S::add(gate, load_tail(a.bias + 2 * c, n));
          up = S::add(up, load_tail(a.bias + 2 * c + 16, n));
        }
        store_tail(a.out + i * a.ldo + c, S::mul(f(gate), up), n);
      }
    }
  });
}

inline void unary(Unary op, const float* x, float* y, int64_t n) {
  with_unary(op, [&](auto f) __attribute__((always_inline)) {
    for (int64_t c = 0; c < n; c += 16) store_tail(y + c, f(load_tail(x + c, n - c)), n - c);
  });
}

inline void rms_norm(const NormArgs& args) {
  const NormArgs a = args;  // a copy: what is stored cannot change it, so it stays in registers
  for (int64_t i = 0; i < a.m; i++) {
    const float* row = a.x + i * a.ldx;
    F s = f16(0.0f);
    for (int64_t c = 0; c < a.n; c += 16) {
      const F v = load_tail(row + c, a.n - c);
      s = S::fma(v, v, s);
    }
    const F r = f16(1.0f / sqrt1(S::sum(s) / float(a.n) + a.eps));
    for (int64_t c = 0; c < a.n; c += 16) {
      F v = S::mul(load_tail(row + c, a.n - c), r);
      if (a.weight) v = S::mul(v, load_tail(a.weight + c, a.n - c));
      store_tail(a.y + i * a.ldy + c, v, a.n - c);
    }
  }
}

inline void layer_norm(const NormArgs& args) {
  const NormArgs a = args;  // a copy: what is stored cannot change it, so it stays in registers
  for (int64_t i = 0; i < a.m; i++) {
    const float* row = a.x + i * a.ldx;
    F s = f16(0.0f);
    for (int64_t c = 0; c < a.n; c += 16) s = S::add(s, load_tail(row + c, a.n - c));
    const F mean = f16(S::sum(s) / float(a.n));
    F v = f16(0.0f);
    for (int64_t c = 0; c < a.n; c += 16) {
      // A short tail is filled with the mean: its lanes add an exact zero.
      F d = S::sub(load_tail(row + c, a.n - c), mean);
      if (a.n - c < 16) {
        float t[16];
        S::store(t, d);
        for (int64_t l = a.n - c; l < 16; l++) t[l] = 0.0f;
        d = S::load(t);
      }
      v = S::fma(d, d, v);
    }
    const F r = f16(1.0f / sqrt1(S::sum(v) / float(a.n) + a.eps));
    for (int64_t c = 0; c < a.n; c += 16) {
      const F d = S::mul(S::sub(load_tail(row + c, a.n - c), mean), r);
      const F w = a.weight ? load_tail(a.weight + c, a.n - c) : f16(1.0f);
      store_tail(a.y + i * a.ldy + c, S::fma(d, w, a.bias ? load_tail(a.bias + c, a.n - c) : f16(0.0f)), a.n - c);
    }
  }
}

inline void softmax(const float* x, int64_t ldx, int64_t m, int64_t n, float* y, int64_t ldy) {
  const float infinity = __builtin_inff();
  for (int64_t i = 0; i < m; i++) {
    const float* row = x + i * ldx;
    float* out = y + i * ldy;
    F tops = f16(-infinity);
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) tops = S::max(tops, S::load(row + c));
    float lanes[16], top = -infinity;
    S::store(lanes, tops);
    for (int l = 0; l < 16; l++) top = max1(top, lanes[l]);
    for (; c < n; c++) top = max1(top, row[c]);
    const F shift = f16(top == -infinity ? 0.0f : top);
    F s = f16(0.0f);
    for (c = 0; c + 16 <= n; c += 16) {
      const F e = exp16(S::sub(S::load(row + c), shift));
      S::store(out + c, e);
      s = S::add(s, e);
    }
    if (c < n) {
      for (int64_t l = 0; l < 16; l++) lanes[l] = c + l < n ? row[c + l] : -infinity;
      const F e = exp16(S::sub(S::load(lanes), shift));
      store_tail(out + c, e, n - c);
      s = S::add(s, e);
    }
    const float sum = S::sum(s);
    for (c = 0; c < n; c += 16) {
      const F p = sum == 0.0f ? f16(0.0f) : S::div(load_tail(out + c, n - c), f16(sum));
      store_tail(out + c, p, n - c);
    }
  }
}

inline double exponential_sums(const float* x, int64_t n, float top, double* sums) {
  const F tops = f16(top), lowest = f16(kLowest);
  double all = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const float* block = x + begin;
    float last[kSumBlock];
    if (n - begin < kSumBlock) {  // -inf adds a zero to both sums
      for (int64_t c = 0; c < kSumBlock; c++) last[c] = begin + c < n ? block[c] : -__builtin_inff();
      block = last;
    }
    F s = f16(0.0f), products = f16(0.0f);
    for (int64_t c = 0; c < kSumBlock; c += 16) {
      const F d = S::max(lowest, S::sub(S::load(block + c), tops)), e = exp16(d);
      s = S::add(s, e);
      products = S::fma(e, d, products);
    }
    *sums++ = double(S::sum(s));
    all = all + double(S::sum(products));
  }
  return all;
}

inline int64_t places_reaching(const float* x, int64_t n, float bound, int64_t* places) {
  const F bounds = f16(bound);
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += 64) {
    uint64_t reached = 0;  // a bit for each of 64 numbers: few are expected, and one test skips them
    for (int64_t c = 0; c < 64 && begin + c < n; c += 16) {
      const int64_t left = n - begin - c;
      const uint64_t lanes = S::at_least(load_tail(x + begin + c, left), bounds);
      reached |= (left >= 16 ? lanes : lanes & ((1u << left) - 1)) << c;
    }
    for (; reached; reached &= reached - 1) places[count++] = begin + __builtin_ctzll(reached);
  }
  return count;
}

inline int64_t place_of_largest(const float* x, int64_t n) {
  constexpr int kSums = 4;  // independent ones, to hide the latency of an addition
  F tops[kSums], sums[kSums];
  each<kSums>([&](auto i) {
    tops[i] = f16(-__builtin_inff());
    sums[i] = f16(0.0f);
  });
  int64_t c = 0;
  for (; c + 16 * kSums <= n; c += 16 * kSums) {
    each<kSums>([&](auto i) __attribute__((always_inline)) {
      const F v = S::load(x + c + 16 * i);
      tops[i] = S::max(tops[i], v);
      sums[i] = S::add(sums[i], v);
    });
  }
  float top = S::maximum(S::max(S::max(tops[0], tops[1]), S::max(tops[2], tops[3])));
  float sum = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
  for (; c < n; c++) {
    top = max1(top, x[c]);
    sum = sum + x[c];
  }
  if (sum != sum) {  // there is a NaN, or both infinities; the maximum of a NaN may be either
    int64_t best = 0;
    for (int64_t i = 0; i < n; i++) {
      if (x[i] != x[i]) return i;
      if (x[i] > x[best]) best = i;
    }
    return best;
  }
  const F bound = f16(top);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const uint32_t lanes = S::at_least(S::load(x + i), bound);
    if (lanes) return i + __builtin_ctz(lanes);
  }
  while (x[i] < top) i++;
  return i;
}

inline void rope(const RopeArgs& given) {
  const RopeArgs args = given;  // a copy: what is stored cannot change it, so it stays in registers
  const int64_t half = args.rotary / 2;
  for (int64_t i = 0; i < args.m; i++) {
    const float *cs = args.cos + i * args.ldc, *sn = args.sin + i * args.ldc;
    for (int64_t h = 0; h < args.heads; h++) {
      const float* from = args.x + i * args.ldx + h * args.head_dim;
      float* to = args.y + i * args.ldy + h * args.head_dim;
      if (args.interleaved) {
        for (int64_t j = 0; j < half; j++) {
          const float a = from[2 * j], b = from[2 * j + 1];
          to[2 * j] = a * cs[j] - b * sn[j];
          to[2 * j + 1] = b * cs[j] + a * sn[j];
        }
      } else {
        for (int64_t j = 0; j < half; j += 16) {
          const int64_t n = half - j;
          const F a = load_tail(from + j, n), b = load_tail(from + j + half, n);
          const F c = load_tail(cs + j, n), s = load_tail(sn + j, n);
          store_tail(to + j, S::sub(S::mul(a, c), S::mul(b, s)), n);
          store_tail(to + j + half, S::add(S::mul(b, c), S::mul(a, s)), n);
        }
      }
      if (to != from)
        for (int64_t j = args.rotary; j < args.head_dim; j++) to[j] = from[j];
    }
  }
}
