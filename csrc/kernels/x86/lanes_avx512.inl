// 16 lanes as one zmm: the primitives of simd.inl and simd_linear.inl for AVX-512 VNNI.

struct S {
  using F = __m512;
  using I = __m512i;
  using W = __m512i;
  using X = const int8_t*;
  using NibbleSum = __m512i;
  using ByteSum = __m512i;
  static constexpr bool kLongNibbleSums = true;
  static constexpr int kPackedRows = 8, kPackedPanels = 2, kTileRows = 8, kTilePanels = 2, kF32Rows = 8;
  static constexpr int kKeyRows = 8, kKeyTiles = 2, kValueRows = 8, kValueColumns = 4, kValueSums = 24;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
  static void store_n(float* p, F v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F select_lt(F a, F b, F x, F y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
  static uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static I bits(F v) { return _mm512_castps_si512(v); }
  static F from_bits(I v) { return _mm512_castsi512_ps(v); }
  static F abs(F v) { return from_bits(_mm512_and_si512(bits(v), iset1(0x7fffffff))); }
  static F neg(F v) { return from_bits(_mm512_xor_si512(bits(v), iset1(int32_t(0x80000000)))); }
  static F with_sign(F v, F sign) {  // (v & 0x7fffffff) | (sign & 0x80000000)
    return from_bits(_mm512_ternarylogic_epi32(iset1(0x7fffffff), bits(v), bits(sign), 0xca));
  }
  static I iset1(int32_t v) { return _mm512_set1_epi32(v); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
  static I ishl23(I v) { return _mm512_slli_epi32(v, 23); }
  static constexpr bool kPowers = true;
  static F fraction(F x) { return _mm512_reduce_ps(x, 8); }  // x - round_to_even(x)
  template <bool bounded>
  static F times_power(F p, F x, F r) {
    if (bounded) return _mm512_scalef_ps(p, sub(x, r));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ), p, sub(x, r));
  }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static F half(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void narrow(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v)); }
  static void put_blocks(int8_t* p, int8_t* q, I a, I b, I c, I d, int32_t* sums) {
    // Dword 4 i + j of `w`: 4 bytes of the i-th quarter of a, b, c or d.
    const __m512i w = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(order, w);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_extracti64x4_epi64(bytes, 1));
    const __m512i all = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), w);
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i one = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), one);
  }
  using Quad = __m128;
  static Quad tops4(I a, I b, I c, I d) {
    const I ab = imax(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const I cd = imax(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const I all = imax(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i two = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_castsi128_ps(_mm_max_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1)));
  }
  template <int of>
  static Quad top_of(Quad q) {
    const __m128i a = _mm_castps_si128(q), b = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0xb1));
    return _mm_castsi128_ps(of == 2 ? b : _mm_max_epi32(b, _mm_shuffle_epi32(b, 0x4e)));
  }
  static F join(Quad a, Quad b, Quad c, Quad d) {
    const __m256 ab = _mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(ab), _mm256_insertf128_ps(_mm256_castps128_ps256(c), d, 1), 1);
  }
  static void narrow16(int16_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(v));
  }
  static void put_every_second(uint8_t* p, const int8_t* q, int first) {
    const __m256i old = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    const __m256i mixed = first ? _mm256_mask_blend_epi8(0xaaaaaaaau, old, _mm256_slli_epi16(wide, 8))
                                : _mm256_mask_blend_epi8(0x55555555u, old, wide);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), mixed);
  }
  using Pairs = __m512i;
  static Pairs load_pairs(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I pdot(I sum, Pairs v, int32_t both) { return _mm512_dpwssd_epi32(sum, v, _mm512_set1_epi32(both)); }
  static float sum(F v) {
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
    return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
  }
  static float maximum(F v) { return _mm512_reduce_max_ps(v); }
  static int32_t isum(I v) { return _mm512_reduce_add_epi32(v); }
  static int32_t imaximum(I v) { return _mm512_reduce_max_epi32(v); }

  static W load_w(const uint8_t* p) { return _mm512_load_si512(p); }
  static void store_w(uint8_t* p, W w) { _mm512_store_si512(p, w); }
  static W byte_weight(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static W nibble_low(const uint8_t* p) { return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15)); }
  static W nibble_high(const uint8_t* p) {
    return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15));
  }
  static X load_x(const int8_t* p) { return p; }
  static I step(X x, int index) {  // 4 activations in every lane
    int32_t four;
    __builtin_memcpy(&four, x + 4 * index, 4);
    return _mm512_set1_epi32(four);
  }
  static NibbleSum nzero(int32_t c) { return _mm512_set1_epi32(c); }
  template <int index>
  static NibbleSum ndot(NibbleSum sum, W w, X x) {
    return _mm512_dpbusd_epi32(sum, w, step(x, index));
  }
  static I nsum(NibbleSum sum, int32_t) { return sum; }
  static ByteSum bzero(int32_t offset) { return _mm512_set1_epi32(offset); }
  template <int index>
  static ByteSum bdot(ByteSum sum, W w, X x) {
    return _mm512_dpbusd_epi32(sum, w, step(x, index));
  }
  static I bsum(ByteSum sum) { return sum; }
};
