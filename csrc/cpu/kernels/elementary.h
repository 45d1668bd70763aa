// exp, tanh and erf on registers. float: within about 2 ulp of the exact value (erf: 1e-7 absolute, which is what
// a GELU needs); double: exp likewise, tanh and erf lane by lane through libm. NaN in, NaN out; exp(±Inf) exact.
#pragma once

#include <math.h>

#include "vec.h"

namespace se_ext::cpu::SE_EXT_ISA {

template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, kept in the low bits
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLargest = 89.0f, kSmallest = -104.0f;  // beyond them: Inf, 0
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kLargest = 710.0, kSmallest = -746.0;
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 13;
};

// 2^k for an integer k, by writing the exponent field.
template <class A, class I>
SE_EXT_INLINE Vec<A> power_of_two(I k) {
  return bit_cast<Vec<A>>((k + ExpConstants<A>::kBias) << ExpConstants<A>::kMantissa);
}

// exp(x) = 2^k · exp(r), r = x - k·ln 2, |r| <= ln(2)/2: Taylor's series, whose remainder is below half an ulp.
// 2^k is applied in two steps so that subnormal results and the last values before Inf come out right.
template <class A>
SE_EXT_INLINE Vec<A> exp_lanes(Vec<A> x) {
  using K = ExpConstants<A>;
  using I = typename Register<A>::integer;
  x = at_least(broadcast<A>(K::kSmallest), at_most(broadcast<A>(K::kLargest), x));
  const Vec<A> shifted = x * static_cast<A>(1.4426950408889634074) + K::kRound;
  const Vec<A> whole = shifted - K::kRound;
  const I k = bit_cast<I>(shifted) - bit_cast<I>(broadcast<A>(K::kRound));
  const Vec<A> r = (x - whole * K::kLn2High) - whole * K::kLn2Low;
  constexpr double kInverseFactorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  Vec<A> series = broadcast<A>(static_cast<A>(kInverseFactorial[K::kDegree]));
  for (int i = K::kDegree - 1; i >= 0; --i) series = series * r + static_cast<A>(kInverseFactorial[i]);
  const I half = k >> 1;
  return series * power_of_two<A>(half) * power_of_two<A>(k - half);
}
SE_EXT_INLINE vfloat exp(vfloat x) {
  return exp_lanes<float>(x);
}
SE_EXT_INLINE vdouble exp(vdouble x) {
  return exp_lanes<double>(x);
}

// 1 + exp(-x), in less than half of exp's instructions: above 87 exp(-x) is not needed to be seen beside 1, so that 2^k
// is never subnormal and one step applies it; and the polynomial is a fit of degree 5, whose relative error is 1.1e-7.
// `beyond` stands for exp(-x) where that is Inf or x a NaN.
SE_EXT_INLINE vfloat one_plus_exp_minus(vfloat x, vfloat beyond) {
  using K = ExpConstants<float>;
  const vfloat t = at_most(broadcast<float>(87.0f), x);
  const vfloat shifted = t * -1.4426950408889634074f + K::kRound;
  const vfloat whole = shifted - K::kRound;
  const vfloat r = (whole * -K::kLn2High - t) - whole * K::kLn2Low;
  const vfloat r2 = r * r;
  const vfloat middle = 0x1.5557b0p-3f * r + 0x1.fffdfcp-2f;
  const vfloat high = 0x1.106250p-7f * r + 0x1.572a64p-5f;
  const vfloat p = (high * r2 + middle) * r2 + (r + 1.0f);
  // Adding k to the exponent multiplies by 2^k; what stands above k in `shifted` falls off. Unsigned, because the sum
  // passes 2^31 where `beyond` is taken.
  const vfloat e = bit_cast<vfloat>(bit_cast<vuint32>(p) + (bit_cast<vuint32>(shifted) << K::kMantissa));
  return 1 + (x >= -88.72283f ? e : beyond);
}

// 1 + exp(-x) where x is also multiplied by what comes of it, which makes NaN of a NaN: Inf may stand for it here.
SE_EXT_INLINE vfloat one_plus_exp_minus(vfloat x) {
  return one_plus_exp_minus(x, broadcast<float>(__builtin_inff()));
}
SE_EXT_INLINE vdouble one_plus_exp_minus(vdouble x) {
  return 1 + exp(-x);
}

SE_EXT_INLINE vfloat sigmoid(vfloat x) {
  return 1 / one_plus_exp_minus(x, x * -__builtin_inff());
}
SE_EXT_INLINE vdouble sigmoid(vdouble x) {
  return 1 / one_plus_exp_minus(x);
}

// Odd polynomial below 0.625 (Cephes tanhf), 1 - 2 / (exp(2|x|) + 1) above.
SE_EXT_INLINE vfloat tanh(vfloat x) {
  const vfloat magnitude = x < 0 ? -x : x;
  const vfloat z = x * x;
  vfloat p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vfloat near = p * z * x + x;
  const vfloat positive = 1 - 2 / (exp(2 * magnitude) + 1);
  return magnitude < 0.625f ? near : (x < 0 ? -positive : positive);
}

// erfc(a) = exp(-a²) · Σ c_i t^i, t = 1 / (1 + 0.3275911 a), a >= 0: the form of Abramowitz and Stegun 7.1.26, with
// eight coefficients fitted by least squares to 6e-10 absolute.
SE_EXT_INLINE vfloat erf(vfloat x) {
  const vfloat a = x < 0 ? -x : x;
  const vfloat t = 1 / (1 + 0.3275911f * a);
  constexpr float kC[] = {0.17384993633790694f, 0.2844742113758401f, -0.20366938761340478f, 0.9186071772697212f,
                          -0.7084681663556055f, 0.4949675185198653f, 0.1111186336357175f,   -0.07087992366113348f};
  vfloat p = broadcast<float>(kC[7]);
  for (int i = 6; i >= 0; --i) p = p * t + kC[i];
  const vfloat positive = 1 - p * t * exp(-(a * a));
  return x < 0 ? -positive : positive;
}

SE_EXT_INLINE vdouble tanh(vdouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}
SE_EXT_INLINE vdouble erf(vdouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::erf(x[i]);
  return x;
}

}  // namespace se_ext::cpu::SE_EXT_ISA
