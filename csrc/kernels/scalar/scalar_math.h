// Elementary functions of one float, of + - * / sqrt and fma only: those of the C libraries differ between platforms.
//
// Every definition has internal linkage, so that each file compiles its own. simd_math.inl repeats exp, sigmoid, tanh,
// erf and gelu over 16 lanes, with the same coefficients in the same order; the rare functions exist only here.
#pragma once

#include <stdint.h>

#include "kernels/kernels.h"

namespace edgeformer {
namespace {

[[maybe_unused]] uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

[[maybe_unused]] float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

[[maybe_unused]] float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
[[maybe_unused]] float sqrt1(float x) { return __builtin_sqrtf(x); }
[[maybe_unused]] float max1(float a, float b) { return a > b ? a : b; }  // b where either is NaN
[[maybe_unused]] float min1(float a, float b) { return a < b ? a : b; }
[[maybe_unused]] float with_sign(float x, float sign) {
  return float_of((bits_of(x) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// exp(x), 2 ulp; 0 below -87 (no subnormals), infinity from 88.73 on.
// x = n ln2 + r, |r| <= ln2 / 2; e^r = 1 + r + r^2 p(r); the result is 2 * (2^(n-1) e^r), so that n = 128 can overflow.
[[maybe_unused]] float exp1(float x) {
  const float c = min1(89.0f, max1(-87.0f, x));
  const float shifted = fma1(c, 1.44269504f, 12582912.0f);  // n in the low bits: 12582912 = 1.5 * 2^23
  const float n = shifted - 12582912.0f;
  float r = fma1(n, -0.693359375f, c);
  r = fma1(n, 2.12194440e-4f, r);
  float p = 1.99169488e-4f;
  p = fma1(p, r, 1.394641236e-3f);
  p = fma1(p, r, 8.333266713e-3f);
  p = fma1(p, r, 4.166626558e-2f);
  p = fma1(p, r, 1.666666716e-1f);
  p = fma1(p, r, 0.5f);
  const float e = fma1(p, r * r, r) + 1.0f;
  const float power = float_of((bits_of(shifted) - 0x4b400000u + 126u) << 23);
  const float y = e * power * 2.0f;
  return x < -87.0f ? 0.0f : y;
}

// 2^x for x <= 0, 3 units of 2^-24; 0 below -126 (no subnormals). x = n + r, |r| <= 1/2; the bits of 1.5 * 2^23 are
// gone after the shift. 2^n is a factor: added to the exponent of 2^r, it would turn some NaN into numbers.
[[maybe_unused]] float exp2_of_negative1(float x) {
  const float shifted = x + 12582912.0f;
  const float r = x - (shifted - 12582912.0f);
  float p = 1.326469821e-3f;
  p = fma1(p, r, 9.671523236e-3f);
  p = fma1(p, r, 5.550733954e-2f);
  p = fma1(p, r, 2.402224243e-1f);
  p = fma1(p, r, 6.931470037e-1f);
  p = fma1(p, r, 1.0f);
  return x < -126.0f ? 0.0f : p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

// With e = exp(-|x|): 1 / (1 + e), or e / (1 + e) below 0. |x| log2(e) is rounded twice, so e is off by up to
// (1.3 |x| + 3) 2^-24 of itself, and sigmoid by that and two more.
[[maybe_unused]] float sigmoid1(float x) {
  const float e = exp2_of_negative1(with_sign(x, 0.0f) * -1.44269504f);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// |x| < 0.625: x + x^3 p(x^2); else 1 - 2 / (exp(2 |x|) + 1) with x's sign.
[[maybe_unused]] float tanh1(float x) {
  const float a = with_sign(x, 0.0f), z = x * x;
  float p = -5.603894126e-3f;
  p = fma1(p, z, 2.055169828e-2f);
  p = fma1(p, z, -5.371410027e-2f);
  p = fma1(p, z, 1.333115250e-1f);
  p = fma1(p, z, -3.333327174e-1f);
  const float small = fma1(p, z * x, x);
  const float large = with_sign(1.0f - 2.0f / (exp1(a + a) + 1.0f), x);
  return a < 0.625f ? small : large;
}

// |x| < 1: x + x p(x^2); else 1 - exp(p(min(|x|, 4))) with x's sign: log(erfc) is nearly a parabola there.
[[maybe_unused]] float erf1(float x) {
  const float z = x * x;
  float p = 7.889114931e-5f;
  p = fma1(p, z, -8.020839887e-4f);
  p = fma1(p, z, 5.189535208e-3f);
  p = fma1(p, z, -2.685444430e-2f);
  p = fma1(p, z, 1.128360033e-1f);
  p = fma1(p, z, -3.761262596e-1f);
  p = fma1(p, z, 1.283791671e-1f);
  const float small = fma1(p, x, x);
  const float magnitude = with_sign(x, 0.0f), a = min1(4.0f, magnitude);
  float q = -2.169774962e-5f;
  q = fma1(q, a, 4.414742580e-4f);
  q = fma1(q, a, -4.205293022e-3f);
  q = fma1(q, a, 2.521036193e-2f);
  q = fma1(q, a, -1.084221378e-1f);
  q = fma1(q, a, -6.332163811e-1f);
  q = fma1(q, a, -1.129580379e+0f);
  q = fma1(q, a, 1.884713129e-4f);
  const float large = with_sign(1.0f - exp1(q), x);
  return magnitude < 1.0f ? small : large;
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), Phi the normal distribution: log2 Phi(-a) is nearly a parabola. Absolute error
// in units of 2^-24, for |x| <= 8: a Phi(-a) <= 0.17 times the error of Phi(-a), which is the polynomial's (minimax for
// this product: 1.4 after it), 3 of exp2 (0.5), and the polynomial's last rounding: 2^-24 |p| ln2, times a Phi(-a) at
// most 0.3. So 2.2, and half an ulp of the result. Beyond 8 the error is that at 8, 5e-15.
[[maybe_unused]] float gelu1(float x) {
  const float a = min1(8.0f, with_sign(x, 0.0f));
  float p = 2.992414557e-5f;
  p = fma1(p, a, -7.398737362e-4f);
  p = fma1(p, a, 7.977460511e-3f);
  p = fma1(p, a, -5.323818326e-2f);
  p = fma1(p, a, -4.589156806e-1f);
  p = fma1(p, a, -1.151147127f);
  p = fma1(p, a, -1.0f);
  return fma1(-a, exp2_of_negative1(p), max1(0.0f, x));
}

// ---- rare functions, in double: plain IEEE operations without fma are the same everywhere --------------------------

// sin(x + quarter * pi / 2), so quarter 1 gives cos. x = n pi / 2 + r: below 2^20 with pi / 2 in three parts (33 bits
// each, products exact), above with the bits of 2 / pi.
[[maybe_unused]] double sin_or_cos(float x, int quarter) {
  double r;
  int64_t n;
  const double wide = double(x), magnitude = wide < 0 ? -wide : wide;
  if (!(magnitude < __builtin_inf())) return wide - wide;  // NaN
  if (magnitude < 1048576.0) {
    const double k = (wide * 0.63661977236758134308 + 6755399441055744.0) - 6755399441055744.0;
    r = ((wide - k * 1.57079632673412561417e+00) - k * 6.07710050630396597660e-11) - k * 2.02226624879595063154e-21;
    n = int64_t(k);
  } else {
    // |x| = mantissa * 2^e, e >= -3. Bits of 2 / pi with weight 2^(2 - e) or more only add whole periods of 4 quarters:
    // skip them. The next 96 bits leave more than 64 behind the point, and no float is nearer to a multiple of pi / 2
    // than 2^-31.
    static const uint32_t two_over_pi[8] = {0xa2f9836e, 0x4e441529, 0xfc2757d1, 0xf534ddc0,
                                            0xdb629599, 0x3c439041, 0xfe5163ab, 0xdebbc561};
    const uint32_t u = bits_of(x) & 0x7fffffffu;
    const int e = int(u >> 23) - 150, skip = e > 2 ? e - 2 : 0;
    unsigned __int128 product = 0;
    for (int bit = skip; bit < skip + 96; bit += 32) {
      const uint64_t pair = uint64_t(two_over_pi[bit / 32]) << 32 | two_over_pi[bit / 32 + 1];
      product = product << 32 | uint32_t(pair << bit % 32 >> 32);
    }
    product *= (u & 0x7fffffu) | 0x800000u;
    product <<= 30 + e - skip;  // now 2^126 is one quarter, and whole periods are shifted out at the top
    const int64_t fraction = int64_t(uint64_t(product >> 62));  // of a quarter, * 2^-64, signed: to the nearest one
    n = int64_t(uint64_t(product >> 126)) + (fraction < 0);
    r = double(fraction) * 0x1p-64 * 1.57079632679489661923;
    if (wide < 0) n = -n, r = -r;
  }
  n += quarter;
  const double z = r * r;
  const double s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 - z / 39916800))));
  const double c = 1 - z * (0.5 - z * (1.0 / 24 - z * (1.0 / 720 - z * (1.0 / 40320 - z * (1.0 / 3628800)))));
  const double y = (n & 1) ? c : s;
  return (n & 2) ? -y : y;
}

// 2 atanh(s) = log((1 + s) / (1 - s)), |s| <= 0.18.
[[maybe_unused]] double log_series(double s) {
  const double z = s * s;
  return 2 * s *
         (1 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * (1.0 / 11 + z * (1.0 / 13 + z / 15)))))));
}

// log(x) of a normal x > 0: x = m 2^e, m in [sqrt(1/2), sqrt(2)).
[[maybe_unused]] double log_positive(double x) {
  uint64_t u;
  __builtin_memcpy(&u, &x, 8);
  int64_t e = int64_t(u >> 52) - 1023;
  u = (u & 0xfffffffffffffull) | 0x3ff0000000000000ull;
  double m;
  __builtin_memcpy(&m, &u, 8);
  if (m > 1.41421356237309504880) m = m * 0.5, e += 1;
  return double(e) * 0.69314718055994530942 + log_series((m - 1) / (m + 1));
}

// -infinity of 0, NaN of a negative number.
[[maybe_unused]] float log1(float x) {
  if (!(x > 0.0f)) return x == 0.0f ? -__builtin_inff() : float_of(0x7fc00000u);
  if (x > 3.4028234663852886e38f) return x;
  return float(log_positive(double(x)));
}

// log(1 + e^x) = max(x, 0) + log1p(u), u = exp(-|x|).
[[maybe_unused]] float softplus1(float x) {
  const double u = double(exp1(0.0f - with_sign(x, 0.0f)));
  const double l = u < 0.4 ? log_series(u / (2 + u)) : log_positive(1 + u);
  return float(double(max1(0.0f, x)) + l);
}

[[maybe_unused]] float unary1(Unary op, float x) {
  switch (op) {
    case Unary::exp:
      return exp1(x);
    case Unary::sigmoid:
      return sigmoid1(x);
    case Unary::tanh:
      return tanh1(x);
    case Unary::erf:
      return erf1(x);
    case Unary::sqrt:
      return sqrt1(x);
    case Unary::sin:
      return float(sin_or_cos(x, 0));
    case Unary::cos:
      return float(sin_or_cos(x, 1));
    case Unary::log:
      return log1(x);
    case Unary::softplus:
      return softplus1(x);
    case Unary::relu:
      return max1(0.0f, x);
    case Unary::relu2:
      return max1(0.0f, x) * max1(0.0f, x);
    case Unary::silu:
      return x * sigmoid1(x);
    case Unary::gelu:
      return gelu1(x);
    // 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    case Unary::gelu_tanh:
      return x * sigmoid1(x * fma1(x * x, 0.0713548163f, 1.59576912f));
    case Unary::quick_gelu:
      return x * sigmoid1(1.702f * x);
    case Unary::neg:
      return float_of(bits_of(x) ^ 0x80000000u);
    case Unary::abs:
      return with_sign(x, 0.0f);
    case Unary::reciprocal:
      return 1.0f / x;
    case Unary::rsqrt:
      return 1.0f / sqrt1(x);
    case Unary::identity:
    case Unary::count:
      break;
  }
  return x;
}

}  // namespace
}  // namespace edgeformer
