// 16 lanes as four q registers: the primitives of simd.inl that the NEON tables share. W is signed bytes, for SDOT.

struct Lanes {
  struct F {
    float32x4_t v[4];
  };
  struct I {
    int32x4_t v[4];
  };
  struct W {
    int8x16_t v[4];
  };

#define EDGEFORMER_EACH(type, expression)          \
  type r;                                          \
  for (int j = 0; j < 4; j++) r.v[j] = expression; \
  return r;

  static F load(const float* p) { EDGEFORMER_EACH(F, vld1q_f32(p + 4 * j)) }
  static void store(float* p, F x) {
    for (int j = 0; j < 4; j++) vst1q_f32(p + 4 * j, x.v[j]);
  }
  static F load_n(const float* p, int n) {
    float lanes[16] = {};
    for (int l = 0; l < n; l++) lanes[l] = p[l];
    return load(lanes);
  }
  static void store_n(float* p, F x, int n) {
    float lanes[16];
    store(lanes, x);
    for (int l = 0; l < n; l++) p[l] = lanes[l];
  }
  static F set1(float x) { EDGEFORMER_EACH(F, vdupq_n_f32(x)) }
  static F add(F x, F y) { EDGEFORMER_EACH(F, vaddq_f32(x.v[j], y.v[j])) }
  static F sub(F x, F y) { EDGEFORMER_EACH(F, vsubq_f32(x.v[j], y.v[j])) }
  static F mul(F x, F y) { EDGEFORMER_EACH(F, vmulq_f32(x.v[j], y.v[j])) }
  static F div(F x, F y) { EDGEFORMER_EACH(F, vdivq_f32(x.v[j], y.v[j])) }
  static F sqrt(F x) { EDGEFORMER_EACH(F, vsqrtq_f32(x.v[j])) }
  static F fma(F x, F y, F z) { EDGEFORMER_EACH(F, vfmaq_f32(z.v[j], x.v[j], y.v[j])) }
  // Not vmaxq: as on x86, y where either is NaN.
  static F max(F x, F y) { EDGEFORMER_EACH(F, vbslq_f32(vcgtq_f32(x.v[j], y.v[j]), x.v[j], y.v[j])) }
  static F min(F x, F y) { EDGEFORMER_EACH(F, vbslq_f32(vcltq_f32(x.v[j], y.v[j]), x.v[j], y.v[j])) }
  static F select_lt(F p, F q, F x, F y) { EDGEFORMER_EACH(F, vbslq_f32(vcltq_f32(p.v[j], q.v[j]), x.v[j], y.v[j])) }
  static uint32_t at_least(F x, F y) {
    const uint32_t powers[4] = {1, 2, 4, 8};
    uint32_t lanes = 0;
    for (int j = 0; j < 4; j++) lanes |= vaddvq_u32(vandq_u32(vcgeq_f32(x.v[j], y.v[j]), vld1q_u32(powers))) << 4 * j;
    return lanes;
  }
  static I bits(F x) { EDGEFORMER_EACH(I, vreinterpretq_s32_f32(x.v[j])) }
  static F from_bits(I x) { EDGEFORMER_EACH(F, vreinterpretq_f32_s32(x.v[j])) }
  static F abs(F x) { EDGEFORMER_EACH(F, vabsq_f32(x.v[j])) }
  static F neg(F x) { EDGEFORMER_EACH(F, vnegq_f32(x.v[j])) }
  static F with_sign(F x, F sign) { EDGEFORMER_EACH(F, vbslq_f32(vdupq_n_u32(0x7fffffff), x.v[j], sign.v[j])) }
  static I iset1(int32_t x) { EDGEFORMER_EACH(I, vdupq_n_s32(x)) }
  static I iadd(I x, I y) { EDGEFORMER_EACH(I, vaddq_s32(x.v[j], y.v[j])) }
  static I imax(I x, I y) { EDGEFORMER_EACH(I, vmaxq_s32(x.v[j], y.v[j])) }
  static I ishl23(I x) { EDGEFORMER_EACH(I, vshlq_n_s32(x.v[j], 23)) }
  static constexpr bool kPowers = false;
  static I to_int(F x) { EDGEFORMER_EACH(I, vcvtnq_s32_f32(x.v[j])) }
  static F to_float(I x) { EDGEFORMER_EACH(F, vcvtq_f32_s32(x.v[j])) }
  static F half(const uint8_t* p) { return widen(vld1q_u8(p), vld1q_u8(p + 16)); }
  static F widen(uint8x16_t a, uint8x16_t b) {  // 16 fp16
    const float16x8_t low = vreinterpretq_f16_u8(a), high = vreinterpretq_f16_u8(b);
    return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
            vcvt_high_f32_f16(high)};
  }
  static void narrow(int8_t* p, I x) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
    vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }
  static void narrow16(int16_t* p, I x) {
    vst1q_s16(p, vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1])));
    vst1q_s16(p + 8, vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3])));
  }
  static void put_every_second(uint8_t* p, const int8_t* q, int first) {
    uint8x16x2_t both = vld2q_u8(p);
    both.val[first] = vreinterpretq_u8_s8(vld1q_s8(q));
    vst2q_u8(p, both);
  }
  struct Pairs {
    int16x8_t first[2], second[2];  // 16 columns of one token, and of the next
  };
  static Pairs load_pairs(const uint8_t* p) {
    const int8x16x2_t b = vld2q_s8(reinterpret_cast<const int8_t*>(p));
    return {{vmovl_s8(vget_low_s8(b.val[0])), vmovl_high_s8(b.val[0])},
            {vmovl_s8(vget_low_s8(b.val[1])), vmovl_high_s8(b.val[1])}};
  }
  static I pdot(I s, Pairs v, int32_t both) {
    const int16x4_t x = vreinterpret_s16_s32(vdup_n_s32(both));
    for (int j = 0; j < 2; j++) {
      s.v[2 * j] = vmlal_lane_s16(s.v[2 * j], vget_low_s16(v.first[j]), x, 0);
      s.v[2 * j + 1] = vmlal_high_lane_s16(s.v[2 * j + 1], v.first[j], x, 0);
      s.v[2 * j] = vmlal_lane_s16(s.v[2 * j], vget_low_s16(v.second[j]), x, 1);
      s.v[2 * j + 1] = vmlal_high_lane_s16(s.v[2 * j + 1], v.second[j], x, 1);
    }
    return s;
  }
  static float sum(F x) {
    const float32x4_t s8[2] = {vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3])};
    const float32x4_t s4 = vaddq_f32(s8[0], s8[1]);
    const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
    return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
  }
  static float maximum(F x) {
    float lanes[16], top;
    store(lanes, x);
    top = lanes[0];
    for (int l = 1; l < 16; l++) top = lanes[l] > top ? lanes[l] : top;
    return top;
  }
  static int32_t isum(I x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
  static int32_t imaximum(I x) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3]))); }
  static void put_blocks(int8_t* p, int8_t* q, I a, I b, I c, I d, int32_t* sums) {
    narrow(p, a);
    narrow(p + 16, b);
    narrow(q, c);
    narrow(q + 16, d);
    const auto four = [](I x) { return vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])); };
    vst1q_s32(sums, vpaddq_s32(vpaddq_s32(four(a), four(b)), vpaddq_s32(four(c), four(d))));
  }
  using Quad = float32x4_t;
  static Quad tops4(I a, I b, I c, I d) {
    const auto four = [](I x) { return vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])); };
    return vreinterpretq_f32_s32(vpmaxq_s32(vpmaxq_s32(four(a), four(b)), vpmaxq_s32(four(c), four(d))));
  }
  template <int of>
  static Quad top_of(Quad q) {
    const int32x4_t a = vreinterpretq_s32_f32(q);
    return vreinterpretq_f32_s32(of == 2 ? vmaxq_s32(a, vrev64q_s32(a)) : vdupq_n_s32(vmaxvq_s32(a)));
  }
  static F join(Quad a, Quad b, Quad c, Quad d) { return {a, b, c, d}; }

  static W load_w(const uint8_t* p) {
    const int8x16x4_t w = vld1q_s8_x4(reinterpret_cast<const int8_t*>(p));
    return {{w.val[0], w.val[1], w.val[2], w.val[3]}};
  }
  static void store_w(uint8_t* p, W w) {
    for (int j = 0; j < 4; j++) vst1q_u8(p + 16 * j, vreinterpretq_u8_s8(w.v[j]));
  }
  static int8x16_t flip(int8x16_t w) { return veorq_s8(w, vdupq_n_s8(-128)); }  // q + 128 -> q
  static int8x16_t low_nibbles(int8x16_t w) { return vandq_s8(w, vdupq_n_s8(15)); }
  static int8x16_t high_nibbles(int8x16_t w) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 4)); }
  static W byte_weight(const uint8_t* p) {
    const W w = load_w(p);
    EDGEFORMER_EACH(W, flip(w.v[j]))
  }
  // Nibbles as signed factors; centred (q4): they are q + 8.
  template <bool centred>
  static W low_nibbles(W w) {
    EDGEFORMER_EACH(W, centred ? vsubq_s8(low_nibbles(w.v[j]), vdupq_n_s8(8)) : low_nibbles(w.v[j]))
  }
  template <bool centred>
  static W high_nibbles(W w) {
    EDGEFORMER_EACH(W, centred ? vsubq_s8(high_nibbles(w.v[j]), vdupq_n_s8(8)) : high_nibbles(w.v[j]))
  }

  // 16 columns of a row of activations in one register; SDOT multiplies all lanes with one of its four dwords.
  using X = int8x16_t;
  static X load_x(const int8_t* p) { return vld1q_s8(p); }
  using ByteSum = I;
  static I bzero(int32_t) { return iset1(0); }
  template <int index>
  static I bdot(I s, W w, X x) {
    EDGEFORMER_EACH(I, vdotq_laneq_s32(s.v[j], w.v[j], x, index))
  }
  static I bsum(I s) { return s; }
#undef EDGEFORMER_EACH
};
