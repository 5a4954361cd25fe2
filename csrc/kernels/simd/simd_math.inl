// Elementary functions over 16 lanes: formulas and bits of scalar_math.h. Included by simd.inl.

inline F f16(float v) { return S::set1(v); }

inline F exp16(F x) {
  const F c = S::min(f16(89.0f), S::max(f16(-87.0f), x));
  const F shifted = S::fma(c, f16(1.44269504f), f16(12582912.0f));
  const F n = S::sub(shifted, f16(12582912.0f));
  F r = S::fma(n, f16(-0.693359375f), c);
  r = S::fma(n, f16(2.12194440e-4f), r);
  F p = f16(1.99169488e-4f);
  p = S::fma(p, r, f16(1.394641236e-3f));
  p = S::fma(p, r, f16(8.333266713e-3f));
  p = S::fma(p, r, f16(4.166626558e-2f));
  p = S::fma(p, r, f16(1.666666716e-1f));
  p = S::fma(p, r, f16(0.5f));
  const F e = S::add(S::fma(p, S::mul(r, r), r), f16(1.0f));
  const F power = S::from_bits(S::ishl23(S::iadd(S::bits(shifted), S::iset1(126 - 0x4b400000))));
  return S::select_lt(x, f16(-87.0f), f16(0.0f), S::mul(S::mul(e, power), f16(2.0f)));
}

// bounded: the caller knows that x >= -126.
template <bool bounded = false, class T = S>
inline F exp2_of_negative16(F x) {
  F r, shifted;
  if constexpr (T::kPowers) {
    r = T::fraction(x);
  } else {
    shifted = S::add(x, f16(12582912.0f));
    r = S::sub(x, S::sub(shifted, f16(12582912.0f)));
  }
  F p = f16(1.326469821e-3f);
  p = S::fma(p, r, f16(9.671523236e-3f));
  p = S::fma(p, r, f16(5.550733954e-2f));
  p = S::fma(p, r, f16(2.402224243e-1f));
  p = S::fma(p, r, f16(6.931470037e-1f));
  p = S::fma(p, r, f16(1.0f));
  if constexpr (T::kPowers) {
    return T::template times_power<bounded>(p, x, r);
  } else {
    const F y = S::mul(p, S::from_bits(S::iadd(S::ishl23(S::bits(shifted)), S::iset1(127 << 23))));
    return bounded ? y : S::select_lt(x, f16(-126.0f), f16(0.0f), y);
  }
}

inline F sigmoid16(F x) {
  const F e = exp2_of_negative16(S::mul(S::abs(x), f16(-1.44269504f)));
  return S::div(S::select_lt(x, f16(0.0f), e, f16(1.0f)), S::add(f16(1.0f), e));
}

inline F gelu16(F x) {
  const F a = S::min(f16(8.0f), S::abs(x));
  F p = f16(2.992414557e-5f);
  p = S::fma(p, a, f16(-7.398737362e-4f));
  p = S::fma(p, a, f16(7.977460511e-3f));
  p = S::fma(p, a, f16(-5.323818326e-2f));
  p = S::fma(p, a, f16(-4.589156806e-1f));
  p = S::fma(p, a, f16(-1.151147127f));
  p = S::fma(p, a, f16(-1.0f));
  return S::fma(S::neg(a), exp2_of_negative16<true>(p), S::max(f16(0.0f), x));
}

inline F tanh16(F x) {
  const F a = S::abs(x), z = S::mul(x, x);
  F p = f16(-5.603894126e-3f);
  p = S::fma(p, z, f16(2.055169828e-2f));
  p = S::fma(p, z, f16(-5.371410027e-2f));
  p = S::fma(p, z, f16(1.333115250e-1f));
  p = S::fma(p, z, f16(-3.333327174e-1f));
  const F small = S::fma(p, S::mul(z, x), x);
  const F tail = S::div(f16(2.0f), S::add(exp16(S::add(a, a)), f16(1.0f)));
  return S::select_lt(a, f16(0.625f), small, S::with_sign(S::sub(f16(1.0f), tail), x));
}

inline F erf16(F x) {
  const F z = S::mul(x, x);
  F p = f16(7.889114931e-5f);
  p = S::fma(p, z, f16(-8.020839887e-4f));
  p = S::fma(p, z, f16(5.189535208e-3f));
  p = S::fma(p, z, f16(-2.685444430e-2f));
  p = S::fma(p, z, f16(1.128360033e-1f));
  p = S::fma(p, z, f16(-3.761262596e-1f));
  p = S::fma(p, z, f16(1.283791671e-1f));
  const F small = S::fma(p, x, x);
  const F magnitude = S::abs(x), a = S::min(f16(4.0f), magnitude);
  F q = f16(-2.169774962e-5f);
  q = S::fma(q, a, f16(4.414742580e-4f));
  q = S::fma(q, a, f16(-4.205293022e-3f));
  q = S::fma(q, a, f16(2.521036193e-2f));
  q = S::fma(q, a, f16(-1.084221378e-1f));
  q = S::fma(q, a, f16(-6.332163811e-1f));
  q = S::fma(q, a, f16(-1.129580379e+0f));
  q = S::fma(q, a, f16(1.884713129e-4f));
  return S::select_lt(magnitude, f16(1.0f), small, S::with_sign(S::sub(f16(1.0f), exp16(q)), x));
}

template <Unary op>
struct UnaryOp {
  F operator()(F x) const {
    switch (op) {
      case Unary::exp:
        return exp16(x);
      case Unary::sigmoid:
        return sigmoid16(x);
      case Unary::tanh:
        return tanh16(x);
      case Unary::erf:
        return erf16(x);
      case Unary::sqrt:
        return S::sqrt(x);
      case Unary::relu:
        return S::max(f16(0.0f), x);
      case Unary::relu2:
        return S::mul(S::max(f16(0.0f), x), S::max(f16(0.0f), x));
      case Unary::silu:
        return S::mul(x, sigmoid16(x));
      case Unary::gelu:
        return gelu16(x);
      case Unary::gelu_tanh:
        return S::mul(x, sigmoid16(S::mul(x, S::fma(S::mul(x, x), f16(0.0713548163f), f16(1.59576912f)))));
      case Unary::quick_gelu:
        return S::mul(x, sigmoid16(S::mul(f16(1.702f), x)));
      case Unary::neg:
        return S::neg(x);
      case Unary::abs:
        return S::abs(x);
      case Unary::reciprocal:
        return S::div(f16(1.0f), x);
      case Unary::rsqrt:
        return S::div(f16(1.0f), S::sqrt(x));
      default:
        return x;
    }
  }
};

// sin, cos, log and softplus are rare: scalar_math.h, lane by lane.
struct RareOp {
  Unary op;
  F operator()(F x) const {
    float v[16];
    S::store(v, x);
    for (int l = 0; l < 16; l++) v[l] = unary1(op, v[l]);
    return S::load(v);
  }
};

// Calls body(f), f: F -> F the function of `op`: one branch for the whole call, none for each vector.
template <class Body>
inline void with_unary(Unary op, Body body) {
  switch (op) {
#define EDGEFORMER_CASE(name) \
  case Unary::name:           \
    return body(UnaryOp<Unary::name>{});
    EDGEFORMER_CASE(identity)
    EDGEFORMER_CASE(exp)
    EDGEFORMER_CASE(sigmoid)
    EDGEFORMER_CASE(tanh)
    EDGEFORMER_CASE(erf)
    EDGEFORMER_CASE(sqrt)
    EDGEFORMER_CASE(relu)
    EDGEFORMER_CASE(relu2)
    EDGEFORMER_CASE(silu)
    EDGEFORMER_CASE(gelu)
    EDGEFORMER_CASE(gelu_tanh)
    EDGEFORMER_CASE(quick_gelu)
    EDGEFORMER_CASE(neg)
    EDGEFORMER_CASE(abs)
    EDGEFORMER_CASE(reciprocal)
    EDGEFORMER_CASE(rsqrt)
#undef EDGEFORMER_CASE
    default:
      return body(RareOp{op});
  }
}
