// The activations and gates: value and gradient, on lanes. ATen's conventions at the kinks. The choice is made at run
// time, once per access: beside the access it costs little, and the kernels are a tenth of what they would be.
#pragma once

#include <cmath>

#include "values.cuh"

namespace se_ext::cuda {

// The elementary functions: CUDA's own, within 2 ulp; `fast` ones, near 1e-6 relative, for half types.
SE_EXT_DEVICE float exponential(float x) {
  return expf(x);
}
SE_EXT_DEVICE double exponential(double x) {
  return exp(x);
}
template <bool fast, class A>
SE_EXT_DEVICE A sigmoid(A x) {
  if constexpr (fast) {
    return fast_reciprocal(1 + fast_exp2(x * -1.4426950408889634074f));
  } else {
    return 1 / (1 + exponential(-x));
  }
}
SE_EXT_DEVICE float cdf(float x) {  // of the normal distribution
  return 0.5f * (1 + erff(x * 0.70710678118654752440f));
}
SE_EXT_DEVICE double cdf(double x) {
  return 0.5 * (1 + erf(x * 0.70710678118654752440));
}
template <class A>
SE_EXT_DEVICE A density(A x) {
  return A(0.39894228040143267794) * exponential(A(-0.5) * x * x);
}
SE_EXT_DEVICE float hyperbolic_tangent(float x) {
  return tanhf(x);
}
SE_EXT_DEVICE double hyperbolic_tangent(double x) {
  return tanh(x);
}
template <class A>
SE_EXT_DEVICE A clamp(A x, A low, A high) {  // lets NaN through
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <Activation a, bool fast, class A>
SE_EXT_DEVICE A activate(A v) {
  if constexpr (a == Activation::Identity) {
    return v;
  } else if constexpr (a == Activation::Relu) {
    return v < 0 ? A(0) : v;
  } else if constexpr (a == Activation::Relu6) {
    return clamp(v, A(0), A(6));
  } else if constexpr (a == Activation::Silu) {
    if constexpr (fast) {
      return v * sigmoid<true>(v);
    } else {
      return v / (1 + exponential(-v));
    }
  } else if constexpr (a == Activation::Gelu) {
    return v * cdf(v);
  } else if constexpr (a == Activation::Hardswish) {
    return v * clamp(v + 3, A(0), A(6)) / 6;
  } else if constexpr (a == Activation::LeakyRelu) {
    return v > 0 ? v : v * A(kLeakySlope);
  } else if constexpr (a == Activation::Tanh) {
    return hyperbolic_tangent(v);
  } else if constexpr (a == Activation::Sigmoid) {
    return sigmoid<fast>(v);
  } else if constexpr (a == Activation::DoubleSigmoid) {
    return 2 * sigmoid<fast>(v);
  } else {
    static_assert(a == Activation::Hardsigmoid);
    return clamp(v + 3, A(0), A(6)) / 6;
  }
}

// g ⊙ a'(v), given the output where slope_from_output(a), the input elsewhere. Where the slope is zero the result is
// zero whatever g is, as in ATen.
template <Activation a, bool fast, class A>
SE_EXT_DEVICE A gradient(A g, A q) {
  const A zero = 0;
  if constexpr (a == Activation::Identity) {
    return g;
  } else if constexpr (a == Activation::Relu) {
    return q <= 0 ? zero : g;
  } else if constexpr (a == Activation::Relu6) {
    return q <= 0 ? zero : (q >= 6 ? zero : g);
  } else if constexpr (a == Activation::Silu) {
    const A sig = sigmoid<fast>(q);
    return (g * sig) * (1 + q * (1 - sig));
  } else if constexpr (a == Activation::Gelu) {
    return g * (cdf(q) + q * density(q));
  } else if constexpr (a == Activation::Hardswish) {
    return q <= -3 ? zero : (q < 3 ? g * (q / 3 + A(0.5)) : g);
  } else if constexpr (a == Activation::LeakyRelu) {
    return q > 0 ? g : g * A(kLeakySlope);
  } else if constexpr (a == Activation::Tanh) {
    return g * (1 - q * q);
  } else if constexpr (a == Activation::Sigmoid) {
    return g * (q * (1 - q));
  } else if constexpr (a == Activation::DoubleSigmoid) {
    return g * (q * (1 - q * A(0.5)));
  } else {
    static_assert(a == Activation::Hardsigmoid);
    return q > 0 ? (q < 1 ? g / 6 : zero) : zero;
  }
}

template <Activation a>
inline constexpr bool kFromOutput = slope_from_output(a);

template <Activation a>
struct Of {
  static constexpr Activation value = a;
};

// f(Of<a>{})
template <class F>
SE_EXT_DEVICE void dispatch(Activation a, const F& f) {
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

// As the kernels take an activation: Identity costs nothing, Any chooses per access.
struct Identity {
  static constexpr bool kIdentity = true;
  Identity() = default;
  SE_EXT_HOST_DEVICE explicit Identity(Activation) {}
};

struct Any {
  static constexpr bool kIdentity = false;
  Activation a;
  Any() = default;
  SE_EXT_HOST_DEVICE explicit Any(Activation chosen) : a(chosen) {}
};

template <bool fast, class A, int n>
SE_EXT_DEVICE void activate(Identity, Lanes<A, n>&) {}

template <bool fast, class A, int n>
SE_EXT_DEVICE void activate(Any any, Lanes<A, n>& v) {
  dispatch(any.a, [&](auto of) {
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) v[j] = activate<decltype(of)::value, fast>(v[j]);
  });
}

// g ← g ⊙ a'(v), given v and a(v)
template <bool fast, class A, int n>
SE_EXT_DEVICE void multiply_by_slope(Identity, Lanes<A, n>&, const Lanes<A, n>&, const Lanes<A, n>&) {}

template <bool fast, class A, int n>
SE_EXT_DEVICE void multiply_by_slope(Any any, Lanes<A, n>& g, const Lanes<A, n>& input, const Lanes<A, n>& output) {
  dispatch(any.a, [&](auto of) {
    constexpr Activation a = decltype(of)::value;
    SE_EXT_UNROLL
    for (int j = 0; j < n; ++j) g[j] = gradient<a, fast>(g[j], kFromOutput<a> ? output[j] : input[j]);
  });
}

}  // namespace se_ext::cuda
