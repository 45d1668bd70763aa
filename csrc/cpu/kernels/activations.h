// The activations and gates: value and gradient, as functions of registers. ATen's conventions at the kinks.
#pragma once

#include "../../params.h"
#include "elementary.h"

namespace se_ext::cpu::SE_EXT_ISA {

template <class V>
SE_EXT_INLINE V constant(double value) {
  return V{} + static_cast<decltype(V{}[0] + 0)>(value);
}

template <class V>
SE_EXT_INLINE V clamp(V x, double low, double high) {
  return at_most(constant<V>(high), at_least(constant<V>(low), x));
}

inline constexpr double kSixth = 1.0 / 6;  // 6 times it is 1 in float and in double

// u = A(v)
template <Activation A, class V>
SE_EXT_INLINE V activate(V v) {
  if constexpr (A == Activation::Identity) {
    return v;
  } else if constexpr (A == Activation::Relu) {
    return at_least(V{}, v);
  } else if constexpr (A == Activation::Relu6) {
    return clamp(v, 0, 6);
  } else if constexpr (A == Activation::Silu) {
    return v / one_plus_exp_minus(v);
  } else if constexpr (A == Activation::Gelu) {
    return v * (constant<V>(0.5) * (1 + erf(v * constant<V>(0.70710678118654752440))));
  } else if constexpr (A == Activation::Hardswish) {
    return v * (clamp(v + 3, 0, 6) * constant<V>(kSixth));
  } else if constexpr (A == Activation::LeakyRelu) {
    return v > 0 ? v : v * constant<V>(kLeakySlope);
  } else if constexpr (A == Activation::Tanh) {
    return tanh(v);
  } else if constexpr (A == Activation::Sigmoid) {
    return sigmoid(v);
  } else if constexpr (A == Activation::DoubleSigmoid) {
    return 2 * sigmoid(v);
  } else {
    static_assert(A == Activation::Hardsigmoid);
    return clamp(v + 3, 0, 6) * constant<V>(kSixth);
  }
}

// u = v · sigmoid(v) and its slope
template <class V>
SE_EXT_INLINE void silu(V v, V& u, V& slope) {
  const V sig = 1 / one_plus_exp_minus(v);
  u = v * sig;
  slope = sig + u * (1 - sig);
}

// g ⊙ A'(v), given the output u where slope_from_output(A), the input v elsewhere. Where the slope is zero the result
// is zero whatever g is, as in ATen: an infinite gradient does not become NaN there.
template <Activation A, class V>
SE_EXT_INLINE V gradient(V g, V q) {
  const V zero{};
  if constexpr (A == Activation::Identity) {
    return g;
  } else if constexpr (A == Activation::Relu) {
    return q <= 0 ? zero : g;
  } else if constexpr (A == Activation::Relu6) {
    return q <= 0 ? zero : (q >= 6 ? zero : g);
  } else if constexpr (A == Activation::Silu) {
    V u, slope;
    silu(q, u, slope);
    return g * slope;
  } else if constexpr (A == Activation::Gelu) {
    const V cdf = constant<V>(0.5) * (1 + erf(q * constant<V>(0.70710678118654752440)));
    return g * (cdf + q * constant<V>(0.39894228040143267794) * exp(q * q * constant<V>(-0.5)));
  } else if constexpr (A == Activation::Hardswish) {
    return q <= -3 ? zero : (q < 3 ? g * (q * constant<V>(1.0 / 3) + constant<V>(0.5)) : g);
  } else if constexpr (A == Activation::LeakyRelu) {
    return q > 0 ? g : g * constant<V>(kLeakySlope);
  } else if constexpr (A == Activation::Tanh) {
    return g * (1 - q * q);
  } else if constexpr (A == Activation::Sigmoid) {
    return g * (q * (1 - q));
  } else if constexpr (A == Activation::DoubleSigmoid) {
    return g * (q * (1 - q * constant<V>(0.5)));
  } else {
    static_assert(A == Activation::Hardsigmoid);
    return q > 0 ? (q < 1 ? g * constant<V>(kSixth) : zero) : zero;
  }
}

// u = A(v) and A'(v) together, for activations whose value and slope share most of their work.
template <Activation A, class V>
SE_EXT_INLINE void value_and_slope(V v, V& u, V& slope) {
  if constexpr (A == Activation::Silu) {
    silu(v, u, slope);
  } else {
    u = activate<A>(v);
    slope = gradient<A>(constant<V>(1), slope_from_output(A) ? u : v);
  }
}

template <Activation A>
struct Of {
  static constexpr Activation value = A;
};

// Turns a runtime activation into a template argument: f(Of<A>{}).
template <class F>
SE_EXT_INLINE void dispatch(Activation a, F&& f) {
  switch (a) {
    case Activation::Identity:
      return f(Of<Activation::Identity>{});
    case Activation::Relu:
      return f(Of<Activation::Relu>{});
    case Activation::Relu6:
      return f(Of<Activation::Relu6>{});
    case Activation::Silu:
      return f(Of<Activation::Silu>{});
    case Activation::Gelu:
      return f(Of<Activation::Gelu>{});
    case Activation::Hardswish:
      return f(Of<Activation::Hardswish>{});
    case Activation::LeakyRelu:
      return f(Of<Activation::LeakyRelu>{});
    case Activation::Tanh:
      return f(Of<Activation::Tanh>{});
    case Activation::Sigmoid:
      return f(Of<Activation::Sigmoid>{});
    case Activation::Hardsigmoid:
      return f(Of<Activation::Hardsigmoid>{});
    case Activation::DoubleSigmoid:
      return f(Of<Activation::DoubleSigmoid>{});
  }
}

}  // namespace se_ext::cpu::SE_EXT_ISA
