// 16 lanes as two ymm: the primitives of simd.inl that AVX2 and AVX-VNNI share. The including file adds the dots.

struct Lanes {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  using W = I;

  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static __m256i first(int n) {  // mask of the lanes < n
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F load_n(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
  }
  static void store_n(float* p, F v, int n) {
    _mm256_maskstore_ps(p, first(n), v.a);
    _mm256_maskstore_ps(p + 8, first(n - 8), v.b);
  }
  static F set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F select_lt(F p, F q, F x, F y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_LT_OQ))};
  }
  static uint32_t at_least(F x, F y) {
    const __m256 a = _mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), b = _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ);
    return uint32_t(_mm256_movemask_ps(a)) | uint32_t(_mm256_movemask_ps(b)) << 8;
  }
  static I bits(F v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
  static F from_bits(I v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
  static F abs(F v) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(v.a, m), _mm256_and_ps(v.b, m)};
  }
  static F neg(F v) {
    const __m256 m = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(v.a, m), _mm256_xor_ps(v.b, m)};
  }
  static F with_sign(F v, F sign) {
    const __m256 m = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_andnot_ps(m, v.a), _mm256_and_ps(m, sign.a)),
            _mm256_or_ps(_mm256_andnot_ps(m, v.b), _mm256_and_ps(m, sign.b))};
  }
  static I iset1(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I imax(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
  static I ishl23(I v) { return {_mm256_slli_epi32(v.a, 23), _mm256_slli_epi32(v.b, 23)}; }
  static constexpr bool kPowers = false;
  static I to_int(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static F half(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
  }
  static void narrow(int8_t* p, I v) {
    const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);  // 16 int16, in order
    const __m128i b = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), b);
  }
  static void narrow16(int16_t* p, I v) {
    const __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w);
  }
  static void put_every_second(uint8_t* p, const int8_t* q, int first) {
    const __m256i old = bytes(p), odd = _mm256_set1_epi16(short(0xff00));
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    const __m256i mixed =
        first ? _mm256_blendv_epi8(old, _mm256_slli_epi16(wide, 8), odd) : _mm256_blendv_epi8(wide, old, odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), mixed);
  }
  // A sum under way. GCC 12 else moves all products before all additions, and the products go through memory.
  static I in_registers(I s) {
    asm("" : "+x"(s.a), "+x"(s.b));
    return s;
  }
  using Pairs = I;
  static Pairs load_pairs(const uint8_t* p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
  }
  static I pdot(I s, Pairs v, int32_t both) {
    const __m256i x = _mm256_set1_epi32(both);
    return in_registers(
        {_mm256_add_epi32(s.a, _mm256_madd_epi16(v.a, x)), _mm256_add_epi32(s.b, _mm256_madd_epi16(v.b, x))});
  }
  static float sum(F v) {
    const __m256 s8 = _mm256_add_ps(v.a, v.b);
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
  }
  static float maximum(F v) {
    const __m256 m8 = _mm256_max_ps(v.a, v.b);
    const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    return _mm_cvtss_f32(_mm_max_ss(m2, _mm_shuffle_ps(m2, m2, 1)));
  }
  static int32_t isum(I v) {
    const __m256i s8 = _mm256_add_epi32(v.a, v.b);
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static int32_t imaximum(I v) {
    const __m256i m8 = _mm256_max_epi32(v.a, v.b);
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256(m8, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
  }
  // a, b as 32 int8 at p; returns 8 sums of 4 bytes each: 4 of a, 4 of b.
  static __m256i put_block(int8_t* p, I a, I b) {
    const __m256i w = _mm256_packs_epi16(_mm256_packs_epi32(a.a, a.b), _mm256_packs_epi32(b.a, b.b));
    const __m256i q = _mm256_permutevar8x32_epi32(w, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), q);
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
  }
  static void put_blocks(int8_t* p, int8_t* q, I a, I b, I c, I d, int32_t* sums) {
    const __m256i s = _mm256_hadd_epi32(put_block(p, a, b), put_block(q, c, d)), t = _mm256_hadd_epi32(s, s);
    const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), all);
  }
  using Quad = __m128;
  static Quad tops4(I a, I b, I c, I d) {
    const __m256i e = _mm256_max_epi32(a.a, a.b), f = _mm256_max_epi32(b.a, b.b);
    const __m256i g = _mm256_max_epi32(c.a, c.b), h = _mm256_max_epi32(d.a, d.b);
    const __m256i ef = _mm256_max_epi32(_mm256_unpacklo_epi32(e, f), _mm256_unpackhi_epi32(e, f));
    const __m256i gh = _mm256_max_epi32(_mm256_unpacklo_epi32(g, h), _mm256_unpackhi_epi32(g, h));
    const __m256i all = _mm256_max_epi32(_mm256_unpacklo_epi64(ef, gh), _mm256_unpackhi_epi64(ef, gh));
    return _mm_castsi128_ps(_mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  }
  template <int of>
  static Quad top_of(Quad q) {
    const __m128i a = _mm_castps_si128(q), b = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0xb1));
    return _mm_castsi128_ps(of == 2 ? b : _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e)));
  }
  static F join(Quad a, Quad b, Quad c, Quad d) { return {_mm256_set_m128(b, a), _mm256_set_m128(d, c)}; }

  static __m256i bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static W load_w(const uint8_t* p) { return {bytes(p), bytes(p + 32)}; }
  static void store_w(uint8_t* p, W w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), w.b);
  }
  static W nibble_low(const uint8_t* p) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes(p), m), _mm256_and_si256(bytes(p + 32), m)};
  }
  static W nibble_high(const uint8_t* p) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(bytes(p), 4), m),
            _mm256_and_si256(_mm256_srli_epi16(bytes(p + 32), 4), m)};
  }
  using X = const int8_t*;
  static X load_x(const int8_t* p) { return p; }
  static __m256i step(X x, int index) {  // 4 activations in every lane
    int32_t four;
    __builtin_memcpy(&four, x + 4 * index, 4);
    return _mm256_set1_epi32(four);
  }
};
