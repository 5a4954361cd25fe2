// Row kernels over S (see simd.inl): epilogues, norms, softmax, rope. Their formulas: Kernels in kernels.h.

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

inline void rms_norm(const float* x, int64_t ldx, int64_t m, int64_t n, const float* weight, float eps, float* y,
                     int64_t ldy) {
  for (int64_t i = 0; i < m; i++) {
    const float* row = x + i * ldx;
    F s = f16(0.0f);
    for (int64_t c = 0; c < n; c += 16) {
      const F v = load_tail(row + c, n - c);
      s = S::fma(v, v, s);
    }
    const F r = f16(1.0f / sqrt1(S::sum(s) / float(n) + eps));
    for (int64_t c = 0; c < n; c += 16) {
      F v = S::mul(load_tail(row + c, n - c), r);
      if (weight) v = S::mul(v, load_tail(weight + c, n - c));
      store_tail(y + i * ldy + c, v, n - c);
    }
  }
}

inline void layer_norm(const float* x, int64_t ldx, int64_t m, int64_t n, const float* weight, const float* bias,
                       float eps, float* y, int64_t ldy) {
  for (int64_t i = 0; i < m; i++) {
    const float* row = x + i * ldx;
    F s = f16(0.0f);
    for (int64_t c = 0; c < n; c += 16) s = S::add(s, load_tail(row + c, n - c));
    const F mean = f16(S::sum(s) / float(n));
    F v = f16(0.0f);
    for (int64_t c = 0; c < n; c += 16) {
      // A short tail is filled with the mean: its lanes add an exact zero.
      F d = S::sub(load_tail(row + c, n - c), mean);
      if (n - c < 16) {
        float t[16];
        S::store(t, d);
        for (int64_t l = n - c; l < 16; l++) t[l] = 0.0f;
        d = S::load(t);
      }
      v = S::fma(d, d, v);
    }
    const F r = f16(1.0f / sqrt1(S::sum(v) / float(n) + eps));
    for (int64_t c = 0; c < n; c += 16) {
      const F d = S::mul(S::sub(load_tail(row + c, n - c), mean), r);
      const F w = weight ? load_tail(weight + c, n - c) : f16(1.0f);
      store_tail(y + i * ldy + c, S::fma(d, w, bias ? load_tail(bias + c, n - c) : f16(0.0f)), n - c);
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

inline void rope(const float* x, int64_t ldx, int64_t m, int64_t heads, int64_t head_dim, int64_t rotary,
                 bool interleaved, const float* cos, const float* sin, int64_t ldc, float* y, int64_t ldy) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < m; i++) {
    const float *cs = cos + i * ldc, *sn = sin + i * ldc;
    for (int64_t h = 0; h < heads; h++) {
      const float* from = x + i * ldx + h * head_dim;
      float* to = y + i * ldy + h * head_dim;
      if (interleaved) {
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
        for (int64_t j = rotary; j < head_dim; j++) to[j] = from[j];
    }
  }
}
