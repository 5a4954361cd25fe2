// What attention makes of one chunk of keys, and how chunks are merged, over S (see simd.inl). Formula: kernels.h.

// max, sum and out of the rows, of one chunk or merged: see the formula in kernels.h.
struct Partials {
  alignas(64) float top[kAttentionRows], sum[kAttentionRows];
  float* out;  // [rows, ldo]
  int64_t ldo;
};

inline bool is_empty(float top, float sum) { return top == -__builtin_inff() && sum == 0.0f; }

// acc[d] = fma(part[d], b, acc[d] * a)
inline void add_scaled(float* acc, float a, const float* part, float b, int64_t n) {
  for (int64_t d = 0; d < n; d += 16)
    S::store(acc + d, S::fma(S::load(part + d), f16(b), S::mul(S::load(acc + d), f16(a))));
}

// Merges a chunk's partials into acc, row by row; the rows' factors are computed in one vector.
inline void merge_rows(int count, Partials& acc, const Partials& part, int64_t n) {
  alignas(64) float top[kAttentionRows], a[kAttentionRows], b[kAttentionRows];
  const F acc_top = S::load(acc.top), part_top = S::load(part.top), most = S::max(acc_top, part_top);
  S::store(top, most);
  S::store(a, exp2_of_negative16(S::sub(acc_top, most)));
  S::store(b, exp2_of_negative16(S::sub(part_top, most)));
  for (int r = 0; r < count; r++) {
    if (is_empty(part.top[r], part.sum[r])) continue;
    acc.top[r] = top[r];
    acc.sum[r] = fma1(part.sum[r], b[r], acc.sum[r] * a[r]);
    add_scaled(acc.out + r * acc.ldo, a[r], part.out + r * part.ldo, b[r], n);
  }
}

inline void finish(float sum, const float* acc, int64_t value_dim, float* out) {
  const F inverse = f16(sum == 0.0f ? 0.0f : 1.0f / sum);
  for (int64_t d = 0; d < value_dim; d += 16) store_tail(out + d, S::mul(S::load(acc + d), inverse), value_dim - d);
}
